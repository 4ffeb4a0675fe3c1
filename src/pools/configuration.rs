//! Reads HAProxy's configuration files, in HAProxy's order, into sections of lines. Knows sections, their `defaults`,
//! `.if`, and the variables and stats sockets of `global`; knows nothing of what any other line means.
//!
//! No crate does this. haproxy-config 0.4 (of 2023, the only one found) keeps one value for each keyword and no line
//! numbers. It supports no quotes, variables, `.if`, `from`, `default-server` or several files. `haproxy -c` only tells
//! whether a file is valid, not what is in it.

use crate::file;
use crate::pools::conditions::{self, Version};
use crate::pools::words::{self, Environment, Words};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The maximum size of a file.
const FILE: u64 = 16 << 20;
/// The maximum length of a condition that is evaluated.
const CONDITION: usize = 300;
/// The names of sections that hold no pool.
const OTHERS: &[&str] = &[
    "acme",
    "cache",
    "crt-store",
    "fcgi-app",
    "http-errors",
    "log-forward",
    "log-profile",
    "mailers",
    "peers",
    "program",
    "resolvers",
    "ring",
    "traces",
    "userlist",
];

/// A line of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The file, as an index into [`Configuration::files`].
    pub file: usize,
    /// The number of the line, from 1.
    pub line: usize,
}

/// A line that is not empty.
#[derive(Clone, Debug)]
pub struct Line {
    /// The place of the line.
    pub place: Place,
    /// The words of the line, at least one.
    pub words: Vec<String>,
}

impl Line {
    /// The word at this index; empty if there is none.
    pub fn word(&self, at: usize) -> &str {
        self.words.get(at).map_or("", String::as_str)
    }

    /// Whether the line begins with these words.
    pub fn begins(&self, words: &[&str]) -> bool {
        words.iter().enumerate().all(|(at, word)| self.word(at) == *word)
    }

    /// The words from this index on, joined by spaces.
    pub fn from(&self, at: usize) -> String {
        self.words.get(at..).unwrap_or_default().join(" ")
    }
}

/// The kind of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `global`
    Global,
    /// `defaults`
    Defaults,
    /// `frontend`
    Frontend,
    /// `backend`
    Backend,
    /// `listen`
    Listen,
    /// Any other.
    Other,
}

/// A section.
#[derive(Clone, Debug)]
pub struct Section {
    /// The kind of the section.
    pub kind: Kind,
    /// The section's name; empty if it has none.
    pub name: String,
    /// The place of the section's first line.
    pub place: Place,
    /// The lines below the first.
    pub lines: Vec<Line>,
    /// The `defaults` section that this section uses, as an index into [`Configuration::sections`].
    pub defaults: Option<usize>,
}

/// HAProxy's whole configuration.
#[derive(Clone, Debug, Default)]
pub struct Configuration {
    /// The names of the files.
    pub files: Vec<String>,
    /// The sections in the order of the files.
    pub sections: Vec<Section>,
    /// What this program did not understand, and where.
    pub notes: Vec<(Place, String)>,
    /// Whether a part was left out, because this program cannot know whether HAProxy reads that part.
    pub is_partial: bool,
}

/// A branch of an `.if`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Branch {
    /// HAProxy reads the lines of this branch.
    Taken,
    /// HAProxy skips this branch, and may read the next one.
    NotYet,
    /// HAProxy skips this branch and all later ones.
    Over,
    /// This program cannot know whether HAProxy reads this branch.
    Unknown,
}

/// Reads all files, because variables and `defaults` of one file hold in the next.
struct Reader<'a> {
    found: Configuration,
    environment: Environment,
    haproxy: &'a dyn Fn() -> Option<Version>,
    branches: Vec<Branch>,
    defaults: Option<usize>,
    open: bool,
}

impl Configuration {
    /// Reads files and folders. Runs HAProxy for its version only if a condition needs the version.
    ///
    /// # Errors
    ///
    /// Names the file that cannot be read, and the reason.
    pub fn read(
        paths: &[PathBuf],
        environment: Environment,
        haproxy: &dyn Fn() -> Option<Version>,
    ) -> Result<Configuration, String> {
        let mut reader = Reader::new(environment, haproxy);
        for path in paths {
            let failed = |error| {
                format!("{}: {error}; is it there, and may this user read it?", path.display())
            };
            if fs::metadata(path).map_err(failed)?.is_dir() {
                for file in folder(path).map_err(failed)? {
                    reader.file(&file)?;
                }
            } else {
                reader.file(path)?;
            }
        }
        Ok(reader.found)
    }

    /// Reads a text as if it were a file of this name.
    pub fn of(name: &str, text: &str, environment: Environment) -> Configuration {
        let mut reader = Reader::new(environment, &|| None);
        reader.text(name, text);
        reader.found
    }

    /// The place as `FILE:LINE`.
    pub fn say(&self, place: Place) -> String {
        format!("{}:{}", self.files.get(place.file).map_or("", String::as_str), place.line)
    }

    /// The lines that apply to a section; those of its `defaults` come first.
    pub fn lines<'a>(&'a self, section: &'a Section) -> Vec<&'a Line> {
        let mut sections = vec![section];
        // A `defaults` section may itself use an earlier one.
        while let Some(at) = sections.last().and_then(|section| section.defaults) {
            sections.push(&self.sections[at]);
        }
        sections.iter().rev().flat_map(|section| &section.lines).collect()
    }

    /// The lines of all `global` sections.
    pub fn global(&self) -> impl DoubleEndedIterator<Item = &Line> {
        let global = self.sections.iter().filter(|section| section.kind == Kind::Global);
        global.flat_map(|section| &section.lines)
    }

    /// The addresses of the stats sockets. A file has no `unix@` before it.
    pub fn stats_sockets(&self) -> impl Iterator<Item = &str> {
        let sockets = self.global().filter(|line| line.begins(&["stats", "socket"]));
        sockets.map(|line| line.word(2)).map(|file| file.strip_prefix("unix@").unwrap_or(file))
    }
}

/// The files that HAProxy reads from a folder, in HAProxy's order.
fn folder(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.as_bytes();
        let file = name.ends_with(b".cfg") && !name.starts_with(b".");
        if file && fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_file()) {
            files.push(entry.path());
        }
    }
    files.sort_by(|one, other| one.as_os_str().as_bytes().cmp(other.as_os_str().as_bytes()));
    Ok(files)
}

impl<'a> Reader<'a> {
    fn new(environment: Environment, haproxy: &'a dyn Fn() -> Option<Version>) -> Self {
        let found = Configuration::default();
        Reader { found, environment, haproxy, branches: Vec::new(), defaults: None, open: false }
    }

    fn file(&mut self, path: &Path) -> Result<(), String> {
        let bytes = file::read(path, FILE).map_err(|error| {
            format!("{}: {error}; is it a file that this user may read?", path.display())
        })?;
        self.text(&path.to_string_lossy(), &String::from_utf8_lossy(&bytes));
        Ok(())
    }

    fn text(&mut self, name: &str, text: &str) {
        let file = self.found.files.len();
        self.found.files.push(name.to_owned());
        self.open = false;
        self.branches.clear();
        for (number, line) in text.split('\n').enumerate() {
            let place = Place { file, line: number + 1 };
            let Words { words, unset, wrong } = words::split(line, &self.environment);
            let Some(first) = words.first() else { continue };
            if first.starts_with('.') {
                self.condition(place, &Line { place, words });
            } else if self.branches.iter().all(|branch| *branch == Branch::Taken) {
                // HAProxy itself sets some, such as HAPROXY_LOCALPEER.
                for name in unset.into_iter().filter(|name| !name.starts_with("HAPROXY_")) {
                    self.note(place, format!("${name} has no value here; is it the service's?"));
                }
                if let Some(wrong) = wrong {
                    self.note(place, wrong.to_owned());
                }
                self.line(Line { place, words });
            }
        }
    }

    fn note(&mut self, place: Place, text: String) {
        self.found.notes.push((place, text));
    }

    /// Handles `.if` and its relatives. Other directives, such as `.notice`, only print something.
    fn condition(&mut self, place: Place, line: &Line) {
        let outer = self.branches.len().saturating_sub(usize::from(line.word(0) != ".if"));
        let counts = self.branches[..outer].iter().all(|branch| *branch == Branch::Taken);
        match line.word(0) {
            ".if" => {
                let branch = if counts { self.branch(place, line) } else { Branch::Over };
                self.branches.push(branch);
            }
            ".elif" | ".else" => {
                let next = match self.branches.last() {
                    Some(Branch::Taken | Branch::Over) => Branch::Over,
                    Some(Branch::NotYet) if line.word(0) == ".else" => Branch::Taken,
                    Some(Branch::NotYet) => self.branch(place, line),
                    Some(Branch::Unknown) => Branch::Unknown,
                    None => return self.note(place, format!("{} without .if", line.word(0))),
                };
                if let Some(last) = self.branches.last_mut() {
                    *last = next;
                }
            }
            ".endif" if self.branches.pop().is_none() => {
                self.note(place, ".endif without .if".to_owned());
            }
            _ => {}
        }
    }

    fn branch(&mut self, place: Place, line: &Line) -> Branch {
        let text = line.from(1);
        let version = if text.contains("version_") { (self.haproxy)() } else { None };
        let holds = if text.len() > CONDITION {
            None
        } else {
            conditions::holds(&text, &self.environment, version.as_ref())
        };
        match holds {
            Some(true) => Branch::Taken,
            Some(false) => Branch::NotYet,
            None => {
                let what = "this condition is not understood here; what depends on it is left out";
                self.note(place, format!("{}: {what}", line.word(0)));
                self.found.is_partial = true;
                Branch::Unknown
            }
        }
    }

    fn line(&mut self, line: Line) {
        let kind = match line.word(0) {
            "global" => Kind::Global,
            "defaults" => Kind::Defaults,
            "frontend" => Kind::Frontend,
            "backend" => Kind::Backend,
            "listen" => Kind::Listen,
            word if OTHERS.contains(&word) => Kind::Other,
            _ => {
                self.variables(&line);
                match self.found.sections.last_mut().filter(|_| self.open) {
                    Some(section) => section.lines.push(line),
                    None => self.note(line.place, "this line is in no section".to_owned()),
                }
                return;
            }
        };
        let name = if line.word(1) == "from" { "" } else { line.word(1) };
        let from = line.words.iter().position(|word| word == "from").map(|at| line.word(at + 1));
        let named =
            |section: &Section| section.kind == Kind::Defaults && Some(&*section.name) == from;
        let defaults = match (kind, from) {
            (Kind::Global | Kind::Other, _) | (Kind::Defaults, None) => None,
            (_, None) => self.defaults,
            (_, Some(from)) => {
                let found = self.found.sections.iter().rposition(named);
                if found.is_none() {
                    self.note(line.place, format!("there is no defaults {from} before this"));
                }
                found
            }
        };
        if kind == Kind::Defaults {
            self.defaults = Some(self.found.sections.len());
        }
        let name = name.to_owned();
        self.found.sections.push(Section {
            kind,
            name,
            place: line.place,
            lines: Vec::new(),
            defaults,
        });
        self.open = true;
    }

    /// Handles the lines of `global` that set or unset variables.
    fn variables(&mut self, line: &Line) {
        if self.found.sections.last().is_none_or(|section| section.kind != Kind::Global) {
            return;
        }
        let (name, value) = (line.word(1).to_owned(), line.word(2).to_owned());
        match line.word(0) {
            "setenv" => drop(self.environment.insert(name, value)),
            "presetenv" => drop(self.environment.entry(name).or_insert(value)),
            "unsetenv" => self.environment.retain(|name, _| !line.words[1..].contains(name)),
            "resetenv" => self.environment.retain(|name, _| line.words[1..].contains(name)),
            _ => {}
        }
    }
}
