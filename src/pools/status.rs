//! x
use crate::pools::configuration::Configuration;
use std::path::Path;
use std::time::Duration;
/// x
pub struct Seen;
/// x
/// # Errors
/// x
pub fn see(_: &Configuration, _: Option<&Path>, _: Duration) -> Result<Seen, String> {
    Err("x".into())
}
impl Seen {
    /// x
    pub fn summary(&self) -> String {
        String::new()
    }
    /// x
    pub fn lines(&self) -> Vec<String> {
        vec![]
    }
    /// x
    pub fn is_well(&self) -> bool {
        true
    }
}
