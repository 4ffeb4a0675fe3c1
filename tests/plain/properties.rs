//! Checks the properties of the fuzz targets on every recorded answer, and on the seeds after a fixed series of changes.
//! tests/fuzz searches further.

#[path = "../fuzz/properties.rs"]
mod property;

use crate::common::{answers, file};
use std::fs;
use std::path::PathBuf;

/// A small generator of pseudo-random numbers (Marsaglia's xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).expect("below")
    }
}

/// Runs a property on each seed, and on some changes of it.
fn check_property(property: fn(&[u8]), seeds: &[Vec<u8>], changes: usize) {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for seed in seeds {
        property(seed);
        for _ in 0..changes {
            let mut bytes = seed.clone();
            for _ in 0..=numbers.below(4) {
                let at = numbers.below(bytes.len() + 1);
                match numbers.below(5) {
                    0 => bytes.insert(at, u8::try_from(numbers.below(256)).expect("a byte")),
                    1 if at < bytes.len() => {
                        bytes[at] = u8::try_from(numbers.below(256)).expect("a byte")
                    }
                    2 => bytes.truncate(at),
                    3 => {
                        let other = &seeds[numbers.below(seeds.len())];
                        let from = numbers.below(other.len() + 1);
                        bytes.splice(at.., other[from..].iter().copied());
                    }
                    _ if at < bytes.len() => drop(bytes.remove(at)),
                    _ => {}
                }
            }
            property(&bytes);
        }
    }
}

/// The files of a seed corpus.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = file("tests/fuzz/seeds").join(target);
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).expect("the seeds").map(|file| file.expect("a file").path()).collect();
    files.sort();
    assert!(files.len() > 10, "{target}");
    files.iter().map(|file| fs::read(file).expect("a seed")).collect()
}

#[test]
fn any_agent_send_line() {
    check_property(property::agent_send, &seeds("agent_send"), 3000);
}

#[test]
fn any_reply() {
    check_property(property::reply, &seeds("reply"), 3000);
}

#[test]
fn any_options() {
    check_property(property::options, &seeds("options"), 3000);
}

#[test]
fn any_memory_file() {
    check_property(property::memory, &seeds("memory"), 100);
}

#[test]
fn any_answer() {
    check_property(property::answer, &seeds("answer"), 1000);
    // the recorded answers
    let mut bodies = Vec::new();
    for version in fs::read_dir(answers()).expect("versions") {
        for file in fs::read_dir(version.expect("a version").path()).expect("answers") {
            let answer = fs::read(file.expect("a file").path()).expect("an answer");
            if let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") {
                bodies.push([b"\0", &answer[end + 4..]].concat());
                bodies.push([b"\x01", &answer[end + 4..]].concat());
            }
        }
    }
    assert!(bodies.len() > 6000);
    bodies.sort();
    check_property(property::answer, &bodies, 3);
}
