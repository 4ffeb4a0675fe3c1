//! x
use crate::pools::service::Service;
use std::path::Path;
/// x
pub fn save(_: &Service, _: Option<&Path>) -> Vec<String> {
    vec![]
}
