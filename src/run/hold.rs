//! An operator's hold: a file that takes this node out of every pool. In goes the file, out comes a state with a reason.
//! Knows nothing of Patroni.

use crate::file;
use crate::haproxy::reply::Otherwise;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// The longest hold file in bytes.
const SIZE_LIMIT: u64 = 4096;

/// A hold that is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// What a node gets that would be ready: drain or maint. An operator who takes a node out does not call it broken.
    pub word: Otherwise,
    /// Why, in the words of whoever wrote the file, or what is wrong with it.
    pub reason: String,
}

/// Reads the hold file, `drain|maint [REASON]`; none if there is no file.
///
/// An empty file means drain, the gentler word: `echo` empties the file before it fills it. Anything else means maint, since
/// somebody wanted to take the node out, and the reason says what is wrong.
///
/// # Errors
///
/// The folder may not be searched. That is no hold, since a `chmod` that is rolled out must not take every node out of its
/// pools; but the operator has to be told.
pub fn read(path: &Path) -> Result<Option<Hold>, String> {
    let wrong = |error: String| {
        let reason = format!("{}: {error}", path.display());
        Ok(Some(Hold { word: Otherwise::Maint, reason }))
    };
    match file::read(path, SIZE_LIMIT) {
        Err(error) => match fs::symlink_metadata(path).map_err(|error| error.kind()) {
            Err(ErrorKind::NotFound) => Ok(None),
            Err(ErrorKind::PermissionDenied) => Err(format!(
                "cannot see whether there is a hold: {}: its folder may not be searched",
                path.display()
            )),
            // it has come since, and the next check reads it; but a link to nothing is a hold
            Ok(there) if error.kind() == ErrorKind::NotFound && !there.is_symlink() => Ok(None),
            _ => wrong(error.to_string()),
        },
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let (word, reason) =
                text.trim().split_once(char::is_whitespace).unwrap_or((text.trim(), ""));
            let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
            if word.is_empty() {
                let reason = "the file is empty".to_owned();
                return Ok(Some(Hold { word: Otherwise::Drain, reason }));
            }
            let word = word.to_ascii_lowercase();
            let word = match word.parse() {
                Ok(word @ (Otherwise::Drain | Otherwise::Maint)) => word,
                _ => return wrong(format!("'{word}' is neither drain nor maint")),
            };
            let reason = if reason.is_empty() { "no reason given".to_owned() } else { reason };
            Ok(Some(Hold { word, reason }))
        }
    }
}
