//! The files in /run: an operator's hold, the memory file of the checks, and the note of the before-stop hook. In go paths,
//! out come open files. Knows nothing of what an answer means.

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
    /// The hold file.
    pub hold: PathBuf,
    /// The note of the before-stop hook.
    pub before_stop: PathBuf,
    /// The memory file.
    pub memory: PathBuf,
}

/// The files. The memory file and the note are open, and the check reads them inside the sandbox.
pub struct Files {
    /// The memory file.
    pub memory: Memory,
    /// The operator's hold, or why the check cannot see whether there is one.
    pub hold: Result<Option<Hold>, String>,
    /// The note of the before-stop hook.
    pub note: Note,
}

impl Paths {
    /// Opens the files. A check by hand does not write to the memory file.
    pub fn open(&self, by_hand: bool) -> Files {
        let memory = Memory::open(&self.memory, by_hand);
        Files { memory, hold: hold::read(&self.hold), note: Note::open(&self.before_stop) }
    }
}
