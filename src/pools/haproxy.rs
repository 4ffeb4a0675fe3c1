//! Runs HAProxy to check a configuration, and sends commands to HAProxy's stats socket. Knows the limits of time and
//! size; knows nothing of what the answers mean.

use crate::pools::conditions::{self, Version};
use crate::pools::configuration::Configuration;
use crate::pools::words::Environment;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// The maximum time for HAProxy to read its configuration.
const READING: Duration = Duration::from_secs(20);
/// The maximum time for HAProxy to print its version.
const VERSION: Duration = Duration::from_secs(10);
/// The maximum output of HAProxy that is kept.
const SAID: u64 = 64 << 10;
/// The maximum time for an answer on the stats socket.
pub const ANSWER: Duration = Duration::from_secs(5);
/// The maximum size of an answer: some 30,000 servers.
const ANSWERED: u64 = 64 << 20;
/// The stats socket of Debian's configuration.
const SOCKET: &str = "/run/haproxy/admin.sock";
/// The folders to search for HAProxy if `PATH` lacks them, as it may for a user other than root.
const FOLDERS: &str = "/usr/sbin:/usr/local/sbin";

/// The path of HAProxy's program, if it is installed.
pub fn find_program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(std::env::split_paths(FOLDERS));
    folders.map(|folder| folder.join("haproxy")).find(|file| file.is_file())
}

/// The version of the installed HAProxy.
pub fn ask_version() -> Option<Version> {
    let (_, said) = run(&find_program()?, ["-v"], &Environment::new(), VERSION).ok()?;
    conditions::version(said.split("version ").nth(1)?)
}

/// Whether HAProxy accepts these files, and what it prints about them.
///
/// # Errors
///
/// HAProxy could not be started, or did not end in time.
pub fn judge(
    files: &[PathBuf],
    environment: &Environment,
) -> Result<Option<(bool, String)>, String> {
    let Some(program) = find_program() else { return Ok(None) };
    // HAProxy accepts a section "program" only in master-worker mode, the mode of haproxy.service.
    let mut arguments = vec!["-W".into(), "-c".into()];
    for file in files {
        arguments.extend(["-f".into(), file.clone()]);
    }
    let judged = run(&program, arguments, environment, READING);
    let (status, said) = judged.map_err(|error| format!("{} -c: {error}", program.display()))?;
    let said = said
        .lines()
        .filter(|line| !line.trim().is_empty() && *line != "Configuration file is valid");
    Ok(Some((status.success(), said.collect::<Vec<_>>().join("\n"))))
}

/// Runs HAProxy until it ends, for a limited time.
fn run(
    program: &Path,
    arguments: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>,
    environment: &Environment,
    limit: Duration,
) -> io::Result<(ExitStatus, String)> {
    let mut child = Command::new(program)
        .args(arguments)
        .envs(environment.iter().filter(|(name, value)| {
            !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
        }))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (said, hear) = mpsc::channel();
    for pipe in [
        out.map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
        err.map(|pipe| Box::new(pipe) as _),
    ] {
        let said = said.clone();
        thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut pipe) = pipe {
                let _ = pipe.by_ref().take(SAID).read_to_end(&mut text);
                // HAProxy must not block on a full pipe.
                let _ = io::copy(&mut pipe, &mut io::sink());
            }
            said.send(text)
        });
    }
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if began.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::Error::other(format!("no end within {} s", limit.as_secs())));
        }
        thread::sleep(Duration::from_millis(5));
    };
    let mut text = String::new();
    for _ in 0..2 {
        // A child process of HAProxy may keep the pipe open.
        let heard = hear.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
        text += &String::from_utf8_lossy(&heard);
    }
    Ok((status, text))
}

/// The stats socket: the first one in the configuration that is a file.
pub fn find_socket(configuration: &Configuration) -> PathBuf {
    let file = configuration.stats_sockets().find(|file| file.starts_with('/'));
    file.unwrap_or(SOCKET).into()
}

/// Sends one command to the stats socket and returns the answer.
///
/// # Errors
///
/// Says what failed and what to look at.
pub fn ask(socket: &Path, command: &str) -> Result<String, String> {
    let name = socket.display().to_string();
    let (answered, answer) = mpsc::channel();
    let (socket, command) = (socket.to_owned(), command.to_owned());
    // If the socket's queue is full, even connect() waits without limit.
    thread::spawn(move || answered.send(asked(&socket, &command)));
    let silent = || Err(io::Error::other(format!("no answer within {} s", ANSWER.as_secs())));
    let answer = answer.recv_timeout(ANSWER).unwrap_or_else(|_| silent());
    answer.map_err(|error| {
        format!("HAProxy does not answer on {name}: {error}; is it running, is this its \"stats socket\", and may this user write there?")
    })
}

fn asked(socket: &Path, command: &str) -> io::Result<String> {
    let end = Instant::now() + ANSWER;
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(ANSWER))?;
    writeln!(stream, "{command}")?;
    stream.shutdown(Shutdown::Write)?;
    let (mut answer, mut part) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let count = stream.read(&mut part)?;
        answer.extend_from_slice(&part[..count]);
        if count == 0 {
            // An answer ends with an empty line, and may be nothing else.
            return match answer.ends_with(b"\n\n") || answer == b"\n" {
                true => Ok(String::from_utf8_lossy(&answer).into_owned()),
                false => Err(io::Error::other("its answer is not whole")),
            };
        }
        if answer.len() as u64 > ANSWERED || Instant::now() > end {
            return Err(io::Error::other("its answer has no end"));
        }
    }
}
