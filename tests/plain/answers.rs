//! Each recorded answer of a real Patroni to a health check becomes the reply in `tests/data/answers/expected.txt`,
//! and Patroni is asked once for it.
//!
//! A new answer needs no Rust: see "A recorded answer, without Rust" in docs/development/testing.md, and `tests/data/answers/more`.

use crate::common::{self, FakePatroni, Outcome, Start, answers, check_with, file, listen, nobody};
use std::collections::HashSet;
use std::{fs, thread};

const CHECKS: &str = "primary read-write master leader standby-leader standby_leader replica read-only \
    sync synchronous async asynchronous quorum read-only-sync read-only-quorum health";

struct Recorded {
    file: String,
    check: String,
    status: String,
    role: String,
    state: String,
    replication_state: &'static str,
}

/// The lines of the index whose path is a CHECK.
fn read_index() -> Vec<Recorded> {
    let index = fs::read_to_string(file("tests/data/answers/index.tsv")).expect("the index");
    let mut recorded = Vec::new();
    for line in index.lines().skip(1) {
        let column: Vec<_> = line.split('\t').collect();
        let check = column[2].trim_start_matches('/');
        let name = check.split('?').next().expect("a name");
        if CHECKS.split_whitespace().any(|known| known == name) {
            let flag = |flag| column[6].split(',').any(|f| f == flag);
            recorded.push(Recorded {
                file: column[0].to_owned(),
                check: check.to_owned(),
                status: column[3].to_owned(),
                role: column[4].to_owned(),
                state: column[5].to_owned(),
                replication_state: match (flag("rs=streaming"), flag("rs=in archive recovery")) {
                    (true, _) => "streaming",
                    (_, true) => "in archive recovery",
                    // Patroni does not tell when it last saw the DCS
                    _ if column[1] == "1.6.5" && matches!(column[5], "stopping" | "restarting") => {
                        "before 2.1.2"
                    }
                    _ => "none",
                },
            });
        }
    }
    recorded
}

/// Runs one check of a fake Patroni with the recorded answer.
fn run_check(recorded: &Recorded) -> Outcome {
    let bytes = fs::read(answers().join(&recorded.file)).expect("the answer");
    let mut timeout = "10s";
    let patroni = match recorded.status.as_str() {
        "refused" => None,
        "timeout" => {
            timeout = "250ms";
            Some(FakePatroni::new(|stream| {
                let _ = std::io::Read::read(stream, &mut [0]);
            }))
        }
        // closed before the request was read
        "reset" => Some(FakePatroni::raw(|stream| {
            let _ = stream.peek(&mut [0]);
        })),
        _ => Some(FakePatroni::answering(bytes)),
    };
    let nobody = nobody();
    let url = match &patroni {
        Some(patroni) => patroni.url(),
        None => format!("http://{}", nobody.local_addr().expect("an address")),
    };
    let folder = common::folder("answers");
    let memory = common::path_in(&folder, "memory");
    let arguments =
        ["--url", &url, "--timeout", timeout, "--memory-file", &memory, &recorded.check];
    let outcome = check_with(Start::Stdin, "127.0.0.1:0", &arguments, listen);
    if let Some(patroni) = patroni {
        assert_eq!(patroni.connections(), 1, "{}: one question for one check", recorded.file);
        // the agent judges replication_state itself and does not send it
        let sent = recorded.check.split("?replication_state").next().expect("a path");
        let line = format!("GET /{sent} HTTP/1.1\r\n");
        let requests = patroni.requests();
        assert!(requests.iter().all(|request| request.starts_with(&line)), "{requests:?}");
        assert_eq!(requests.len(), usize::from(recorded.status != "reset"), "{}", recorded.file);
    }
    assert_eq!(outcome.code, Some(0), "{}: {outcome:?}", recorded.file);
    outcome
}

struct Expected {
    line: String,
    status: String,
    role: String,
    state: String,
    replication_state: String,
    checks: Vec<String>,
    reply: String,
}

impl Expected {
    fn covers(&self, recorded: &Recorded) -> bool {
        let is = |expected: &str, got: &str| expected == if got.is_empty() { "-" } else { got };
        is(&self.status, &recorded.status)
            && is(&self.role, &recorded.role)
            && is(&self.state, &recorded.state)
            && (self.replication_state == "-"
                || self.replication_state == recorded.replication_state)
            && (self.checks == ["every"] || self.checks.contains(&recorded.check))
    }
}

fn read_expected() -> Vec<Expected> {
    let table = fs::read_to_string(file("tests/data/answers/expected.txt")).expect("the table");
    let lines = table.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let column: Vec<_> = line.split('|').map(|column| column.trim().to_owned()).collect();
            assert_eq!(column.len(), 6, "{line}");
            Expected {
                line: line.to_owned(),
                status: column[0].clone(),
                role: column[1].clone(),
                state: column[2].clone(),
                replication_state: column[3].clone(),
                checks: column[4].split_whitespace().map(str::to_owned).collect(),
                reply: column[5].clone(),
            }
        })
        .collect()
}

/// Finds the row of the decision table for this answer, or says what is wrong with the reply.
fn judge<'a>(table: &'a [Expected], recorded: &Recorded) -> Result<&'a Expected, String> {
    let covering: Vec<_> = table.iter().filter(|row| row.covers(recorded)).collect();
    let name = format!("{} /{} {}", recorded.file, recorded.check, recorded.status);
    let [row] = covering[..] else {
        return Err(format!("{name}: covered by {} lines of expected.txt", covering.len()));
    };
    let outcome = run_check(recorded);
    let words = outcome.reply.split(" # ").next().expect("a word");
    let line = outcome.reply.strip_suffix('\n').unwrap_or("no newline");
    if words != row.reply || line.contains('\n') || line.len() > 120 {
        return Err(format!("{name}: {} expected, got {:?}", row.reply, outcome.reply));
    }
    // the journal gets a line for a broken node and none for a healthy one
    let broken = !row.reply.starts_with("up ");
    if outcome.stderr.lines().count() != usize::from(broken) {
        return Err(format!("{name}: the journal got {:?}", outcome.stderr));
    }
    Ok(row)
}

#[test]
fn every_recorded_answer_becomes_the_expected_reply() {
    let table = read_expected();
    let recorded = read_index();
    assert!(recorded.len() > 3000, "only {} recorded answers", recorded.len());
    // most checks wait most of the time
    let judged: Vec<_> = thread::scope(|scope| {
        let table = &table;
        let parts = recorded.chunks(recorded.len().div_ceil(8));
        let judges: Vec<_> = parts
            .map(|part| {
                scope.spawn(move || part.iter().map(|it| judge(table, it)).collect::<Vec<_>>())
            })
            .collect();
        judges.into_iter().flat_map(|judge| judge.join().expect("no panic")).collect()
    });
    let used: HashSet<_> = judged.iter().flatten().map(|row| &row.line).collect();
    let unused = table.iter().filter(|row| !used.contains(&row.line));
    let wrong: Vec<_> = (judged.iter().filter_map(|judged| judged.as_ref().err().cloned()))
        .chain(unused.map(|row| format!("covers no answer: {}", row.line)))
        .collect();
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn selected_answers_get_these_replies() {
    let lines = fs::read_to_string(file("tests/data/answers/lines.txt")).expect("the lines");
    let recorded = read_index();
    let mut wrong = String::new();
    let mut count = 0;
    for expected in lines.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (file, rest) = expected.split_once(' ').expect("a file");
        let (check, line) = rest.trim_start().split_once(' ').expect("a check");
        let recorded =
            recorded.iter().find(|recorded| recorded.file == file && recorded.check == check);
        let outcome =
            run_check(recorded.unwrap_or_else(|| panic!("{file} is no answer to {check}")));
        count += 1;
        if outcome.reply != format!("{}\n", line.trim_start()) {
            wrong += &format!("{file} {check} {}", outcome.reply);
        }
    }
    assert!(count >= 40, "{count} lines");
    assert!(wrong.is_empty(), "got:\n{wrong}");
}

/// The first line of each file has the check, two blanks and the reply. The recorded answer follows.
#[test]
fn answers_that_were_saved_by_hand() {
    let folder = file("tests/data/answers/more");
    let mut tried = 0;
    for entry in fs::read_dir(&folder).expect("tests/data/answers/more") {
        let path = entry.expect("a file").path();
        let bytes = fs::read(&path).expect("a file");
        let newline = bytes.iter().position(|byte| *byte == b'\n').expect("a first line");
        let first = String::from_utf8_lossy(&bytes[..newline]);
        let (check, reply) = first.split_once("  ").expect("CHECK, two blanks, the reply");
        let patroni = FakePatroni::answering(&bytes[newline + 1..]);
        let outcome = common::check(&["--url", &patroni.url(), check]);
        assert_eq!(outcome.reply.trim_end(), reply.trim_end(), "{}", path.display());
        tried += 1;
    }
    assert!(tried > 0);
}
