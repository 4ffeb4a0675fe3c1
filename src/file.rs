//! A regular file of this machine. In goes a path, out comes the open file or its bytes. Knows nothing of Patroni and
//! HAProxy.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file. Any other file is an error, since it could keep the check waiting or feed it without end. The open
/// file is checked, since another file may have taken the name.
pub fn open(file: &Path, options: &mut OpenOptions, flags: i32) -> io::Result<(File, Metadata)> {
    let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | flags).open(file)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    Ok((file, metadata))
}

/// Whether the process or the machine lacked descriptors or memory. That says nothing of the file, and may soon be over.
pub fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// Reads a regular file of at most `limit` bytes; a longer one is an error.
pub fn read(file: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let (file, metadata) = open(file, OpenOptions::new().read(true), 0)?;
    // room for one byte more, so that the second read finds the end
    let mut bytes = Vec::with_capacity(metadata.len().min(limit) as usize + 1);
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("longer than {limit} bytes")));
    }
    Ok(bytes)
}
