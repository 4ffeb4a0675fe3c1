//! The memory file: one file in /run with a record for each health check. In goes a health check, out comes the record that
//! its last check left. Knows nothing of what an answer means.

use crate::clock::now;
use crate::file;
use crate::patroni::check::{self, Check};
use crate::patroni::location::Endpoint;
use rustix::io::retry_on_intr;
use rustix::process::{Resource, getrlimit};
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The size of a record in bytes. A record is stored in one write.
pub const RECORD: usize = 64;
/// The size of the file in bytes: one page.
pub const SIZE: usize = 64 * RECORD;
const PLACES: usize = SIZE / RECORD;
/// The number of places for checks without a query. No check with a query can take them, since any peer can make up queries.
/// If a check finds Patroni at several addresses, the first one has these places, and the others share the rest.
const PLAIN: usize = 24;
/// The place of the agent-send lines that are not valid.
const NO_CHECK: usize = check::NUMBERS;
const _: () = assert!(NO_CHECK < PLAIN);
/// A check that was made within this time keeps its place.
const KEEP: Duration = Duration::from_secs(60);
/// Each record begins with this, so that the agent never writes to another file.
const MAGIC: [u8; 4] = *b"PAC1";
/// The bits of a time in milliseconds: enough for some thousands of years.
const TIME_MASK: u64 = (1 << 48) - 1;
const HOW_TO_CREATE: &str = "systemd-tmpfiles --create creates";
/// The threads of a listener read and store records one after the other, so that only one of them logs the same trouble.
static TURN: Mutex<()> = Mutex::new(());

/// What one health check leaves for the next. All times are those of [`now`], in milliseconds.
#[derive(Clone, Debug, Default, Hash, PartialEq, Eq)]
pub struct Record {
    /// The later of two times: when the question of the last ready answer was sent, and when the last other answer came.
    pub at: Duration,
    /// How long after `at` trouble may be bridged at most. A bad answer leaves zero, a standby's transition what was left.
    pub lease: Duration,
    /// When the question of the last ready answer was sent.
    pub ready: Option<Duration>,
    /// The time of Patroni's clock in the last answer that was no trouble, in seconds since 1970.
    pub date: u32,
    /// Whether the cluster was paused in the last good answer.
    pub pause: bool,
    /// Whether a connection to Patroni was refused since the last good answer.
    pub refused: bool,
    /// When trouble began, if there is any.
    pub trouble: Option<Duration>,
    /// When Patroni first answered that it stops or restarts PostgreSQL, if it has answered nothing else since.
    pub stopping: Option<Duration>,
    /// When the journal last got a line about trouble.
    pub logged: Duration,
    /// Whether this check wrote that line.
    pub own_line: bool,
    /// How many lines this check wrote, each less than a minute after the one before, counted up to 31.
    pub lines: u8,
    /// A number for the source whose check made this record; 0 before it is stored.
    pub source: u16,
}

/// The time since 1970, by the clock that can be set.
fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The memory file, open and not read yet.
#[derive(Debug)]
pub struct Memory {
    file: Result<File, String>,
    /// The file's folder exists. systemd-tmpfiles creates it with the file.
    is_installed: bool,
}

impl Memory {
    /// Opens the file, and creates it if need be and not `read_only`.
    pub fn open(path: &Path, read_only: bool) -> Memory {
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only).create(!read_only).mode(0o644);
        // a link must not lead to another file
        let opened = file::open(path, &mut options, libc::O_NOFOLLOW);
        let file = opened.and_then(|(file, metadata)| match metadata.len() {
            // one record after the last place does no harm
            length if length > (SIZE + RECORD) as u64 => Err(not_a_memory_file()),
            // a write beyond this limit would kill the process
            _ if getrlimit(Resource::Fsize).current.is_some_and(|limit| limit < SIZE as u64) => {
                Err(io::Error::other("LimitFSIZE= is less than 4096"))
            }
            _ => Ok(file),
        });
        let hint = |error: &io::Error| match error.kind() {
            // in a folder that belongs to root, the agent may not create the file
            ErrorKind::NotFound | ErrorKind::PermissionDenied => format!("; {HOW_TO_CREATE} it"),
            _ => String::new(),
        };
        let is_installed = !file.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound);
        let file = file.map_err(|error| {
            let forbidden = error.kind() == ErrorKind::PermissionDenied;
            let what = match forbidden && matches!(path.try_exists(), Ok(false)) {
                true => "missing".to_owned(),
                false => error.to_string(),
            };
            format!("{}: {what}{}", path.display(), hint(&error))
        });
        Memory { file, is_installed }
    }

    /// The file's descriptor, for the sandbox.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.file.as_ref().ok().map(File::as_raw_fd)
    }

    /// Reads the record of this check, or that of the invalid lines. Of several addresses of Patroni, the one that answered
    /// last counts. The record is empty if the file cannot be read, or if the stored record is torn, from another boot or
    /// from the future.
    pub fn recall(
        self,
        endpoints: &[Endpoint],
        check: Option<&Check>,
        source: Option<IpAddr>,
    ) -> Recalled {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let number = check.map_or(Some(NO_CHECK), Check::plain_number);
        let mut records = vec![0; SIZE];
        let file = self.file.and_then(|file| {
            let read = read(&file, &mut records);
            read.map(|()| file).map_err(|error| error.to_string())
        });
        // after the read, so that no record of another check is from the future
        let now = now();
        let of = |patroni: &Endpoint| {
            let key = hash(&(patroni, check.map_or("", Check::text)));
            // usually the record is in the place with the check's number
            let mut places = number.into_iter().chain(0..PLACES);
            let found =
                places.find_map(|place| Some((place, find_record(&records, place, key, now)?)));
            (key, found)
        };
        // if times are equal, the last address counts: the one on which HAProxy asked
        let at = |(_, found): &(u64, Option<(usize, Record)>)| {
            found.as_ref().map(|(_, record)| record.at)
        };
        let (key, found) = endpoints.iter().map(of).max_by_key(at).unwrap_or_default();
        let (place, last) = found.unzip();
        let source = (hash(&source) as u16).max(1);
        let place = place.unwrap_or_else(|| choose_place(&records, number, source, now));
        let plain = number.is_some();
        let last = last.unwrap_or_default();
        let is_installed = self.is_installed;
        Recalled { file, is_installed, records, last, place, key, now, plain, source, _turn }
    }
}

fn hash(what: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

fn read(file: &File, records: &mut [u8]) -> io::Result<()> {
    let length = retry_on_intr(|| rustix::io::read(file, &mut *records))?;
    // a damaged record counts as none, and the next record takes its place
    let is_record = |bytes: &[u8]| bytes.starts_with(&MAGIC);
    let bytes = &records[..length];
    if bytes.chunks(RECORD).any(is_record) || bytes.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    records.fill(0);
    Err(not_a_memory_file())
}

fn not_a_memory_file() -> io::Error {
    io::Error::other(format!("not a memory file; remove it, and {HOW_TO_CREATE} one"))
}

fn read_record(records: &[u8], place: usize, now: Duration) -> Option<(u64, Record)> {
    decode(&records[place * RECORD..][..RECORD], now)
}

/// Reads the record in this place, if it has this key.
fn find_record(records: &[u8], place: usize, key: u64, now: Duration) -> Option<Record> {
    // cheaper than the checksum
    if records[place * RECORD..][8..16] != key.to_le_bytes() {
        return None;
    }
    read_record(records, place, now).map(|(_, record)| record)
}

/// Chooses a place for a check that has none: that of its number if free, or a shared one. A check keeps its place for a
/// minute. If all places are taken, the source with the most places loses its oldest one, but only to a source with fewer.
fn choose_place(records: &[u8], plain: Option<usize>, source: u16, now: Duration) -> usize {
    let of = |place: usize| read_record(records, place, now).map(|(_, record)| record);
    let last_used =
        |record: &Record| record.at.max(record.logged).max(record.trouble.unwrap_or_default());
    let is_free = |place: usize| {
        of(place).is_none_or(|record| now.saturating_sub(last_used(&record)) >= KEEP)
    };
    if let Some(free) = plain.into_iter().chain(PLAIN..PLACES).find(|place| is_free(*place)) {
        return free;
    }
    let taken: Vec<_> = (PLAIN..PLACES).filter_map(|place| Some((place, of(place)?))).collect();
    let has = |source: u16| taken.iter().filter(|(_, other)| other.source == source).count();
    let most = taken.iter().map(|(_, other)| other.source).max_by_key(|source| has(*source));
    let loses = most.filter(|most| has(*most) > has(source)).unwrap_or(source);
    let theirs = taken.iter().filter(|(_, other)| other.source == loses);
    theirs.min_by_key(|(_, record)| last_used(record)).map_or(PLAIN, |(place, _)| *place)
}

/// The records as they were read, and the place of one check.
#[derive(Debug)]
pub struct Recalled {
    file: Result<File, String>,
    /// The file's folder exists. If it does not, only a check by hand reports the error.
    pub is_installed: bool,
    records: Vec<u8>,
    /// The record that the last check of this kind left.
    pub last: Record,
    place: usize,
    key: u64,
    /// When the file was read.
    pub now: Duration,
    /// The check has no query.
    plain: bool,
    source: u16,
    _turn: MutexGuard<'static, ()>,
}

impl Recalled {
    /// Why the file cannot be used.
    pub fn error(&self) -> Option<&str> {
        self.file.as_ref().err().map(String::as_str)
    }

    /// The records of the checks without a query.
    pub fn plain_records(&self) -> impl Iterator<Item = Record> {
        self.records_of(NO_CHECK)
    }

    /// The records whose trouble counts as that of this check in the journal. For a check without a query, these are the
    /// records without a query, since any peer can make up queries.
    pub fn comparable_records(&self) -> impl Iterator<Item = Record> {
        self.records_of(if self.plain { PLAIN } else { PLACES })
    }

    fn records_of(&self, places: usize) -> impl Iterator<Item = Record> {
        let read = |place| read_record(&self.records, place, self.now);
        (0..places).filter_map(read).map(|(_, record)| record)
    }

    /// Stores this record for the next check, in one write. Fails if the file cannot be used or written.
    pub fn store(self, record: &Record) -> Result<(), String> {
        let source = if record.source == 0 { self.source } else { record.source };
        let record = Record { source, ..record.clone() };
        let (bytes, offset) = (encode(self.key, &record, self.now), self.place * RECORD);
        match self.file?.write_at(&bytes, offset as u64) {
            Ok(RECORD) => Ok(()),
            Ok(_) => Err("the memory was not written as a whole".to_owned()),
            Err(error) => Err(format!("the memory cannot be written: {error}")),
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Computes a record's checksum. Another release of Rust may compute another one, and then the record counts as torn once.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    (hash(&bytes) as u32).to_le_bytes()
}

fn encode(key: u64, record: &Record, now: Duration) -> [u8; RECORD] {
    let time = |time: Option<Duration>| milliseconds(time.unwrap_or_default()).to_le_bytes();
    let lease = u16::try_from(record.lease.as_millis()).unwrap_or(u16::MAX);
    let flags = u8::from(record.pause)
        | u8::from(record.refused) << 1
        | u8::from(record.own_line) << 2
        | record.lines << 3;
    let mut bytes = [0; RECORD];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..8].copy_from_slice(&record.date.to_le_bytes());
    bytes[8..16].copy_from_slice(&key.to_le_bytes());
    bytes[16..24].copy_from_slice(&time(Some(record.at)));
    bytes[24..32].copy_from_slice(&time(record.ready));
    bytes[32..40].copy_from_slice(&time(record.trouble));
    bytes[40..48].copy_from_slice(&time(Some(record.logged)));
    // in whole milliseconds before `at`, so that rounding does not move the time; 0.1.0 wrote zero here
    let stopping = record.stopping.map_or(0, |since| {
        let passed = milliseconds(record.at).saturating_sub(milliseconds(since));
        u16::try_from(passed + 1).unwrap_or(u16::MAX)
    });
    bytes[46..48].copy_from_slice(&stopping.to_le_bytes());
    // the difference of the two clocks tells one boot from another
    let booted = wall_clock().saturating_sub(now);
    bytes[48..56].copy_from_slice(&time(Some(booted)));
    bytes[54..56].copy_from_slice(&record.source.to_le_bytes());
    bytes[56..58].copy_from_slice(&lease.to_le_bytes());
    bytes[58] = flags;
    let sum = checksum(&bytes[..60]);
    bytes[60..].copy_from_slice(&sum);
    bytes
}

fn decode(bytes: &[u8], now: Duration) -> Option<(u64, Record)> {
    let number =
        |from: usize| Some(u64::from_le_bytes(bytes.get(from..from + 8)?.try_into().ok()?));
    let time = |from: usize| number(from).map(Duration::from_millis);
    let optional = |from: usize| Some(time(from)?).map(|time| (!time.is_zero()).then_some(time));
    if !bytes.starts_with(&MAGIC) || bytes[60..] != checksum(&bytes[..60]) {
        return None;
    }
    let short = |from: usize| u16::from_le_bytes([bytes[from], bytes[from + 1]]);
    let at = time(16)?;
    let stopping = u64::from(short(46)).checked_sub(1);
    let record = Record {
        at,
        lease: Duration::from_millis(short(56).into()),
        ready: optional(24)?,
        date: u32::from_le_bytes(bytes[4..8].try_into().ok()?),
        pause: bytes[58] & 1 != 0,
        refused: bytes[58] & 2 != 0,
        trouble: optional(32)?,
        stopping: stopping.map(|passed| at.saturating_sub(Duration::from_millis(passed))),
        // two of the times have only 48 bits, and the other bits contain something else
        logged: Duration::from_millis(number(40)? & TIME_MASK),
        own_line: bytes[58] & 4 != 0,
        lines: bytes[58] >> 3,
        source: short(54),
    };
    // after another boot, the difference has changed by more than the time that the machine had been up; somebody who sets
    // the clock changes it by less
    let booted = wall_clock().saturating_sub(now);
    let then = Duration::from_millis(number(48)? & TIME_MASK);
    let same_boot = booted.abs_diff(then) < record.at.max(Duration::from_secs(1));
    let past = [Some(record.at), record.ready, record.trouble, Some(record.logged)];
    let past = past.into_iter().flatten().all(|time| time <= now);
    (same_boot && past).then_some((number(8)?, record))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);
    const MILLISECOND: Duration = Duration::from_millis(1);

    /// If the machine has been up for as long as before a reboot, only the wall clock shows the reboot.
    #[test]
    fn a_record_from_another_boot_does_not_count() {
        let left = encode(1, &Record { at: NOW, ..Record::default() }, NOW);
        let recalled = |later: Duration| decode(&left, NOW + later).is_some();
        assert!(recalled(NOW - KEEP), "the clock was set");
        assert!(!recalled(NOW + KEEP));
    }

    #[test]
    fn a_file_may_have_one_more_record_and_nothing_more() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        for (length, counts) in [(SIZE, true), (SIZE + RECORD, true), (SIZE + RECORD + 1, false)] {
            file.as_file().set_len(length as u64).expect("a length");
            assert_eq!(Memory::open(file.path(), false).file.is_ok(), counts, "{length}");
        }
    }

    #[test]
    fn a_record_with_a_changed_bit_does_not_count() {
        let left = encode(1, &Record { at: NOW, ..Record::default() }, NOW);
        for place in 0..RECORD {
            let mut torn = left;
            torn[place] ^= 1;
            assert!(decode(&torn, NOW).is_none(), "byte {place}");
        }
    }

    /// The fields that share their bytes have their largest numbers.
    #[test]
    fn a_stored_record_is_read_back() {
        let record = Record {
            at: NOW,
            lease: 4 * MILLISECOND,
            ready: Some(NOW - KEEP),
            date: 5,
            pause: true,
            refused: false,
            trouble: Some(NOW - MILLISECOND),
            stopping: Some(NOW - u32::from(u16::MAX - 1) * MILLISECOND),
            logged: NOW,
            own_line: true,
            lines: 31,
            source: u16::MAX,
        };
        assert_eq!(decode(&encode(1, &record, NOW), NOW), Some((1, record.clone())));
        for stopping in [None, Some(NOW), Some(NOW - KEEP)] {
            let record = Record { stopping, source: 0, ..record.clone() };
            assert_eq!(decode(&encode(1, &record, NOW), NOW), Some((1, record)));
        }
    }

    /// One source asks many questions, before and after another source asks a few.
    #[test]
    fn no_source_takes_the_places_of_another_source() {
        let mut records = vec![0; SIZE];
        let mut now = NOW;
        let mut asks = |source: u16, key: u64| {
            now += MILLISECOND;
            let mut places = 0..PLACES;
            let own = places.find(|place| find_record(&records, *place, key, now).is_some());
            let place = own.unwrap_or_else(|| choose_place(&records, None, source, now));
            let record = Record { at: now, source, ..Record::default() };
            records[place * RECORD..][..RECORD].copy_from_slice(&encode(key, &record, now));
            own.is_some()
        };
        for key in 0..99 {
            asks(1, key);
        }
        for key in 100..120 {
            asks(2, key);
        }
        for round in 0..3 {
            for key in 200..299 {
                asks(1, key);
            }
            // although the other source asks seldom
            assert!((100..120).all(|key| asks(2, key)), "{round}");
        }
        // a third source gets its part, and no source that has no more than its part loses a place
        for key in 300..313 {
            asks(3, key);
        }
        for key in 200..299 {
            asks(1, key);
        }
        assert!((300..313).all(|key| asks(3, key)));
        // the places of checks that were not made within a minute are free
        now += KEEP;
        assert!(choose_place(&records, None, 4, now) == PLAIN);
    }
}
