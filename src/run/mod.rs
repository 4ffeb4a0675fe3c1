//! What others left in /run for a check: an operator's hold, the memory of the last checks, the note of the before-stop
//! hook. In go paths, out come open files. Knows nothing of what an answer means.

pub mod before_stop;
pub mod hold;
pub mod memory;

use before_stop::Note;
use hold::Hold;
use memory::Memory;
use std::path::PathBuf;

/// Where the files are.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    /// The operator's hold.
    pub hold: PathBuf,
    /// Where the before-stop hook leaves its note.
    pub before_stop: PathBuf,
    /// The memory of the last checks.
    pub memory: PathBuf,
}

/// The files. The memory and the note are open, and are read inside the sandbox.
pub struct Files {
    /// The memory of the last checks.
    pub memory: Memory,
    /// The operator's hold, or why it is unknown whether there is one.
    pub hold: Result<Option<Hold>, String>,
    /// The note of the before-stop hook.
    pub note: Note,
}

impl Paths {
    /// Opens the files. A check by hand writes nothing.
    pub fn open(&self, by_hand: bool) -> Files {
        let memory = Memory::open(&self.memory, by_hand);
        Files { memory, hold: hold::read(&self.hold), note: Note::open(&self.before_stop) }
    }
}
