//! An operator's hold: a file that takes this node out of every pool. Out comes a state with a reason. Knows nothing of
//! Patroni.

use crate::file;
use crate::haproxy::reply::AdminState;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// The longest hold file in bytes.
const SIZE_LIMIT: u64 = 4096;

/// An active hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The state of a node that would otherwise be ready.
    pub state: AdminState,
    /// The operator's reason, or what is wrong with the file.
    pub reason: String,
}

/// Reads the hold file, `drain|maint [REASON]`; none if there is no file.
///
/// An empty file means drain, the gentler state, since `echo` empties the file before it writes. A file with anything else
/// means maint, since somebody wanted to take the node out. A file that cannot be read for want of descriptors or memory
/// means drain.
///
/// Fails if the agent may not search the folder. That is no hold: a `chmod` that is rolled out must not take every node out
/// of its pools. But the operator has to be told.
pub fn read(path: &Path) -> Result<Option<Hold>, String> {
    let hold = |state, error: &str| {
        let reason = format!("{}: {error}", path.display());
        Ok(Some(Hold { state, reason }))
    };
    match file::read(path, SIZE_LIMIT) {
        Err(error) => match fs::symlink_metadata(path).map_err(|error| error.kind()) {
            Err(ErrorKind::NotFound) => Ok(None),
            Err(ErrorKind::PermissionDenied) => Err(format!(
                "cannot see whether there is a hold: {}: its folder may not be searched",
                path.display()
            )),
            // the file was made since then, and the next check reads it; but a link to nothing is a hold
            Ok(there) if error.kind() == ErrorKind::NotFound && !there.is_symlink() => Ok(None),
            _ if file::is_shortage(&error) => hold(AdminState::Drain, &error.to_string()),
            _ => hold(AdminState::Maint, &error.to_string()),
        },
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let mut words = text.split_whitespace();
            let Some(word) = words.next().map(str::to_ascii_lowercase) else {
                let reason = "the file is empty".to_owned();
                return Ok(Some(Hold { state: AdminState::Drain, reason }));
            };
            let Ok(state) = word.parse() else {
                let error = format!("'{word}' is neither drain nor maint");
                return hold(AdminState::Maint, &error);
            };
            let reason = words.collect::<Vec<_>>().join(" ");
            let reason = if reason.is_empty() { "no reason given".to_owned() } else { reason };
            Ok(Some(Hold { state, reason }))
        }
    }
}
