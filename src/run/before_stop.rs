//! The note of the before-stop hook (`patroni-before-stop`): Patroni is about to stop PostgreSQL, and Patroni's REST API
//! may fall silent. The hook leaves the note, and a check learns from it how long it may wait. Knows nothing of HAProxy.

use crate::clock::now;
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a note is valid: a forgotten one must not take a node out.
const VALID: Duration = Duration::from_secs(10);
/// How often a check that waits for Patroni looks for a note.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A note is twenty digits and a newline.
const LENGTH: usize = 21;

/// The note's file, opened before the check is confined; none if it cannot be opened.
#[derive(Clone, Debug)]
pub struct Note(Option<Arc<File>>);

impl Note {
    /// Opens the file.
    pub fn open(path: &Path) -> Note {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        Note(OpenOptions::new().read(true).custom_flags(flags).open(path).ok().map(Arc::new))
    }

    /// Whether a hook has left the note within the last ten seconds.
    pub fn is_valid(&self) -> bool {
        let mut bytes = [0; LENGTH];
        let read = self.0.as_ref().and_then(|file| file.read_at(&mut bytes, 0).ok());
        let text = read.and_then(|length| std::str::from_utf8(&bytes[..length]).ok());
        let began = text.and_then(|text| text.trim().parse().ok()).map(Duration::from_millis);
        began.and_then(|began| now().checked_sub(began)).is_some_and(|age| age < VALID)
    }
}

/// How long a check waits for Patroni: until the deadline, or for a third of that time once there is a note. A Patroni that
/// stops may stay silent, and HAProxy has to be told of the drain before PostgreSQL stops.
#[derive(Clone, Debug)]
pub struct Patience {
    /// The check waits no longer than this.
    pub deadline: Instant,
    with_note: Instant,
    note: Note,
}

/// How long a check waits for Patroni if there is a note.
pub fn timeout_with_note(timeout: Duration) -> Duration {
    timeout / 3
}

impl Patience {
    /// The patience of a check.
    pub fn new(started: Instant, timeout: Duration, note: Note) -> Patience {
        let with_note = started + timeout_with_note(timeout);
        Patience { deadline: started + timeout, with_note, note }
    }

    /// Waits until this deadline, with a note or without.
    pub fn until(deadline: Instant) -> Patience {
        Patience { deadline, with_note: deadline, note: Note(None) }
    }

    /// How long to wait before the check looks for a note again. Fails when the time is over.
    pub fn remaining(&self) -> io::Result<Duration> {
        let now = Instant::now();
        if now < self.with_note {
            return Ok(self.with_note - now);
        }
        let end = if self.note.is_valid() { self.with_note } else { self.deadline };
        match end.saturating_duration_since(now) {
            Duration::ZERO => Err(ErrorKind::TimedOut.into()),
            left => Ok(left.min(LOOK_EVERY)),
        }
    }
}

/// Leaves the note and returns its file, locked: another hook gets [`io::ErrorKind::WouldBlock`] meanwhile.
pub fn leave_note(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOCTTY;
    let file = OpenOptions::new().write(true).custom_flags(flags).open(path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    // all notes have one length, so that a check never reads the rest of an older one
    file.write_all_at(format!("{:020}\n", now().as_millis()).as_bytes(), 0)?;
    Ok(file)
}
