//! What the last checks left in /run for the next: when Patroni last gave a good answer, and since when there
//! is trouble. Knows the file and its one record for each health check; knows nothing of what they lead to.

use crate::check::Check;
use crate::patroni::Endpoint;
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One record is one write of this many bytes.
pub const RECORD: usize = 64;
/// The whole file: one page.
pub const SIZE: usize = 64 * RECORD;
const PLACES: usize = SIZE / RECORD;
/// The places of the checks without a query, which no check with one can take: anybody may ask anything.
const PLAIN: usize = 24;
/// The place of what is no check, the last of them.
const NO_CHECK: usize = PLAIN - 1;
/// What each record begins with, so that no other file is ever written to.
const MAGIC: [u8; 4] = *b"PAC1";
const FOREIGN: &str = "not a memory file; remove it, and systemd-tmpfiles --create patroni-agent-check.conf creates one";
/// Checks that are threads of one process read and leave one after the other, so that the journal hears once of what
/// they all met in the same moment.
static TURN: Mutex<()> = Mutex::new(());
/// While trouble lasts the journal gets one line in this time.
const MINUTE: Duration = Duration::from_secs(60);

/// What is remembered of one health check. All times are those of CLOCK_BOOTTIME, in milliseconds.
#[derive(Clone, Debug, Default, Hash, PartialEq, Eq)]
pub struct Record {
    /// When the question was asked to which the node was ready, or when any other answer came: the later of both.
    pub at: Duration,
    /// How long after `at` trouble may be bridged at the most; zero after a bad answer, the rest after a standby's
    /// transition.
    pub lease: Duration,
    /// When the question was asked to which the node was ready last.
    pub ready: Option<Duration>,
    /// Patroni's own clock in the last answer that was no trouble, in seconds since 1970.
    pub date: u32,
    /// Whether the cluster was paused in the last good answer.
    pub pause: bool,
    /// Whether a connection was refused since then.
    pub refused: bool,
    /// Since when there is trouble.
    pub trouble: Option<Duration>,
    /// When Patroni first said that it is stopping or restarting this PostgreSQL, if it has said nothing else since.
    pub stopping: Option<Duration>,
    /// When the journal last heard of it.
    logged: Duration,
    /// Whether it heard of it from this check.
    spoke: bool,
}

/// What the journal is told of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It has begun.
    Began,
    /// It has lasted for this long.
    Lasts(Duration),
    /// It is over, after this long.
    Ended(Duration),
}

/// CLOCK_BOOTTIME: it goes on while the machine sleeps, and is never set.
pub fn now() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// The clock that may be set, in seconds since 1970.
fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The memory file, not read yet.
#[derive(Debug)]
pub struct Memory(Result<File, String>);

impl Memory {
    /// Opens the file; makes it if it is not there, unless somebody only looks.
    pub fn open(path: &Path, look: bool) -> Memory {
        // a FIFO must not keep the check waiting, and a link not lead elsewhere
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOCTTY;
        let mut options = OpenOptions::new();
        options.read(true).write(!look).create(!look).mode(0o644).custom_flags(flags);
        let plain = |file: File| match file.metadata()? {
            metadata if !metadata.is_file() => Err(io::Error::other("not a regular file")),
            metadata if metadata.len() > SIZE as u64 => Err(io::Error::other(FOREIGN)),
            // writing beyond it would kill the process
            _ if getrlimit(Resource::Fsize).current.is_some_and(|limit| limit < SIZE as u64) => {
                Err(io::Error::other("LimitFSIZE= is less than 4096"))
            }
            _ => Ok(file),
        };
        let file = options.open(path).and_then(plain);
        // in a folder of root's the agent may not make it
        let cure = |error: &io::Error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::PermissionDenied => {
                "; systemd-tmpfiles --create patroni-agent-check.conf creates it"
            }
            _ => "",
        };
        Memory(file.map_err(|error| format!("{}: {error}{}", path.display(), cure(&error))))
    }

    /// The descriptor, for the sandbox.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.0.as_ref().ok().map(File::as_raw_fd)
    }

    /// Reads what was left for a check of the Patroni at this host and port, or for lines that were not understood.
    /// Nothing was, if the file cannot be read, or the record is torn, of another Patroni, of another boot or of the
    /// future.
    pub fn recall(self, patroni: &Endpoint, check: Option<&Check>) -> Recalled {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut hasher = DefaultHasher::new();
        (patroni, check.map_or("", Check::text)).hash(&mut hasher);
        let key = hasher.finish();
        let mine = check.map_or(Some(NO_CHECK), Check::plain_number);
        let mine = mine.filter(|number| *number <= NO_CHECK);
        let mut records = vec![0; if mine.is_some() { PLAIN * RECORD } else { SIZE }];
        let file = self.0.and_then(|mut file| {
            let read = read(&mut file, &mut records);
            read.map(|()| file).map_err(|error| error.to_string())
        });
        // only now: what another check has left meanwhile is not of the future
        let now = now();
        let place = mine.unwrap_or_else(|| shared_place(&records, key, now));
        Recalled { file, records, place, key, now, _turn: turn }
    }
}

fn read(file: &mut File, records: &mut [u8]) -> io::Result<()> {
    let length = loop {
        match file.read(records) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            length => break length?,
        }
    };
    let ours = |record: &[u8]| record.starts_with(&MAGIC) || *record == [0; RECORD][..record.len()];
    if records[..length].chunks(RECORD).all(ours) {
        return Ok(());
    }
    records.fill(0);
    Err(io::Error::other(FOREIGN))
}

fn read_record(records: &[u8], place: usize, now: Duration) -> Option<(u64, Record)> {
    decode(&records[place * RECORD..][..RECORD], now)
}

/// The place of a check with a query: its own, or a free one, or that of the check which was not asked for longest.
fn shared_place(records: &[u8], key: u64, now: Duration) -> usize {
    let of = |place: &usize| read_record(records, *place, now);
    let mine = (PLAIN..PLACES).find(|place| of(place).is_some_and(|(other, _)| other == key));
    let asked = |place: &usize| of(place).map(|(_, record)| record.at.max(record.logged));
    mine.or_else(|| (PLAIN..PLACES).min_by_key(asked)).unwrap_or(PLAIN)
}

/// All records as they were when they were read, and the place of one check.
#[derive(Debug)]
pub struct Recalled {
    file: Result<File, String>,
    records: Vec<u8>,
    place: usize,
    key: u64,
    now: Duration,
    _turn: MutexGuard<'static, ()>,
}

impl Recalled {
    /// What was left for this check.
    pub fn last(&self) -> Record {
        match read_record(&self.records, self.place, self.now) {
            Some((key, record)) if key == self.key => record,
            _ => Record::default(),
        }
    }

    /// What is wrong with the file.
    pub fn error(&self) -> Option<&str> {
        self.file.as_ref().err().map(String::as_str)
    }

    /// What the journal is told: a line when trouble begins, one in a minute while it lasts, one when it ends,
    /// however many checks meet it. Without a memory each check tells what it met.
    pub fn news(&self, record: &mut Record) -> Option<News> {
        let last = self.last();
        let Some(since) = record.trouble else {
            let ended = last.trouble.filter(|_| last.spoke)?;
            return Some(News::Ended(self.now.saturating_sub(ended)));
        };
        // For a check without a query these are only its like: who asks something that nobody else does must not
        // keep the journal from hearing of the others.
        let others = (0..self.records.len() / RECORD)
            .filter_map(|place| read_record(&self.records, place, self.now));
        let in_trouble = others.filter(|(_, other)| other.trouble.is_some());
        let heard = in_trouble.map(|(_, other)| other.logged).max();
        if let Some(heard) = heard.filter(|heard| self.now.saturating_sub(*heard) < MINUTE) {
            // what takes another one's place must not forget it
            record.logged = heard;
            return None;
        }
        (record.logged, record.spoke) = (self.now, true);
        Some(match last.trouble {
            None => News::Began,
            Some(_) => News::Lasts(self.now.saturating_sub(since)),
        })
    }

    /// What the journal is told of a line that is not understood, which anybody may send: that one came, once a
    /// minute. Without a memory, nothing.
    pub fn news_of_no_check(self) -> Option<News> {
        let last = self.last().logged;
        let due = last.is_zero() || self.now.saturating_sub(last) >= MINUTE;
        if !due || self.file.is_err() {
            return None;
        }
        let logged = self.now;
        self.leave(&Record { logged, ..Record::default() });
        Some(News::Began)
    }

    /// Whether Patroni gave some check without a query a good answer within this time: the node is well, and HAProxy's
    /// lines are as a rule in time.
    pub fn is_well(&self, grace: Duration) -> bool {
        (0..NO_CHECK)
            .filter_map(|place| read_record(&self.records, place, self.now))
            .any(|(_, record)| self.now.saturating_sub(record.at) < grace.min(record.lease))
    }

    /// Leaves this for the next check: one write. Says whether it is there now.
    pub fn leave(self, record: &Record) -> bool {
        let (bytes, offset) = (encode(self.key, record, self.now), self.place * RECORD);
        self.file.is_ok_and(|file| {
            file.write_at(&bytes, offset as u64).is_ok_and(|written| written == RECORD)
        })
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    (hasher.finish() as u32).to_le_bytes()
}

fn encode(key: u64, record: &Record, now: Duration) -> [u8; RECORD] {
    let time = |time: Option<Duration>| milliseconds(time.unwrap_or_default()).to_le_bytes();
    let lease = u16::try_from(record.lease.as_millis()).unwrap_or(u16::MAX);
    let flags =
        u8::from(record.pause) | u8::from(record.refused) << 1 | u8::from(record.spoke) << 2;
    let mut bytes = [0; RECORD];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..8].copy_from_slice(&record.date.to_le_bytes());
    bytes[8..16].copy_from_slice(&key.to_le_bytes());
    bytes[16..24].copy_from_slice(&time(Some(record.at)));
    bytes[24..32].copy_from_slice(&time(record.ready));
    bytes[32..40].copy_from_slice(&time(record.trouble));
    bytes[40..48].copy_from_slice(&time(Some(record.logged)));
    // by how much the two clocks differ, which says whether it is the same boot
    let booted = wall_clock().saturating_sub(now);
    bytes[48..56].copy_from_slice(&time(Some(booted)));
    // In whole milliseconds, so that the time does not move with the next answers. Programs before 0.2 have zero here.
    let stopping = record.stopping.map_or(0, |since| {
        let passed = milliseconds(record.at).saturating_sub(milliseconds(since));
        u16::try_from(passed + 1).unwrap_or(u16::MAX)
    });
    bytes[54..56].copy_from_slice(&stopping.to_le_bytes());
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
    let maybe = |from: usize| Some(time(from)?).map(|time| (!time.is_zero()).then_some(time));
    if !bytes.starts_with(&MAGIC) || bytes[60..] != checksum(&bytes[..60]) {
        return None;
    }
    let at = time(16)?;
    let record = Record {
        at,
        lease: Duration::from_millis(u16::from_le_bytes([bytes[56], bytes[57]]).into()),
        ready: maybe(24)?,
        date: u32::from_le_bytes(bytes[4..8].try_into().ok()?),
        pause: bytes[58] & 1 != 0,
        refused: bytes[58] & 2 != 0,
        trouble: maybe(32)?,
        stopping: u64::from(u16::from_le_bytes([bytes[54], bytes[55]]))
            .checked_sub(1)
            .map(|passed| at.saturating_sub(Duration::from_millis(passed))),
        logged: time(40)?,
        spoke: bytes[58] & 4 != 0,
    };
    // At another boot the two clocks differ by what they differed then and at least the time that the machine had
    // been up; when somebody sets the clock, by less.
    let booted = wall_clock().saturating_sub(now);
    let then = Duration::from_millis(number(48)? & 0xffff_ffff_ffff);
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

    /// What is recalled of this record, in a file that nothing can be left in.
    fn recalled(record: &Record) -> Recalled {
        let file = File::open("/dev/null").map_err(|error| error.to_string());
        let mut records = encode(1, record, NOW).to_vec();
        records.resize(PLAIN * RECORD, 0);
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        Recalled { file, records, place: 0, key: 1, now: NOW, _turn: turn }
    }

    #[test]
    fn the_journal_hears_again_when_a_minute_is_over() {
        let trouble = Some(NOW - 2 * MINUTE);
        for (ago, news, of_no_check) in [
            (MINUTE - MILLISECOND, None, None),
            (MINUTE, Some(News::Lasts(2 * MINUTE)), Some(News::Began)),
        ] {
            let mut record = Record { trouble, logged: NOW - ago, ..Record::default() };
            assert_eq!(recalled(&record).news_of_no_check(), of_no_check);
            assert_eq!(recalled(&record).news(&mut record), news);
        }
    }

    /// Only the clock that may be set tells a reboot after which the machine is up for as long as it was before.
    #[test]
    fn what_another_boot_left_is_nothing() {
        let left = encode(1, &Record { at: NOW, ..Record::default() }, NOW);
        let recalled = |later: Duration| decode(&left, NOW + later).is_some();
        assert!(recalled(NOW - MINUTE), "the clock was set");
        assert!(!recalled(NOW + MINUTE));
    }

    #[test]
    fn a_record_that_is_not_as_it_was_left_is_nothing() {
        let left = encode(1, &Record { at: NOW, ..Record::default() }, NOW);
        for place in 0..RECORD {
            let mut torn = left;
            torn[place] ^= 1;
            assert!(decode(&torn, NOW).is_none(), "byte {place}");
        }
    }

    #[test]
    fn a_node_is_well_as_long_as_its_grace() {
        let record = Record { at: NOW - MINUTE, lease: MINUTE, ..Record::default() };
        assert!(!recalled(&record).is_well(MINUTE));
        let record = Record { at: NOW - MINUTE + MILLISECOND, ..record };
        assert!(recalled(&record).is_well(MINUTE) && recalled(&record).is_well(2 * MINUTE));
    }
}
