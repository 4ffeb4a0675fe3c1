//! The change from root to another user. In goes a user's name in `/etc/passwd`; the process becomes that user, or the uid
//! comes out. Hand-written, since crates for this ask the name services, which may hang. Knows nothing of Patroni.

use crate::file;
use rustix::io::Errno;
use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::io;
use std::path::Path;

const PASSWD: &str = "/etc/passwd";
/// The longest `/etc/passwd` in bytes: some 50,000 users.
const SIZE_LIMIT: u64 = 4 * 1024 * 1024;

/// Becomes this user for good, with the user's own group and no other, if root started this process. The process must have
/// only one thread, since each thread has its own user. After an error, the process must not go on.
pub fn become_user(name: &str) -> Result<(), String> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let passwd = read_passwd().map_err(|error| format!("{PASSWD}: {error}"))?;
    let numbers = find_ids(&passwd, name)
        .ok_or_else(|| {
            format!(
                "not in {PASSWD}: systemd-sysusers adds it, or, if another name service has it, getent passwd {name} >> {PASSWD}"
            )
        })?;
    let (uid, gid) =
        numbers.ok_or_else(|| format!("its line in {PASSWD} is root's, or invalid"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // the kernel then drops all capabilities, and lets no other process of that user look into this one
    set_thread_groups(&[gid])
        .and_then(|()| set_thread_res_gid(gid, gid, gid))
        .and_then(|()| set_thread_res_uid(uid, uid, uid))
        .map_err(|error| format!("cannot become this user (CapabilityBoundingSet=?): {error}"))?;
    // the change is good only if it cannot be undone
    match set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT) {
        Err(Errno::PERM) => Ok(()),
        _ => Err("this user can become root again".to_owned()),
    }
}

/// Finds the uid of a user other than root.
pub fn find_uid(name: &str) -> Option<u32> {
    find_ids(&read_passwd().ok()?, name).flatten().map(|(uid, _)| uid)
}

fn read_passwd() -> io::Result<Vec<u8>> {
    file::read(Path::new(PASSWD), SIZE_LIMIT)
}

/// Finds a user's uid and gid in the first line of this name (passwd(5)). The inner option is none if one of them is not
/// valid: 0 is root, and the largest number means "no change" to the kernel.
fn find_ids(passwd: &[u8], name: &str) -> Option<Option<(u32, u32)>> {
    let mut lines =
        passwd.split(|byte| *byte == b'\n').map(|line| line.split(|byte| *byte == b':'));
    let mut fields =
        lines.find_map(|mut fields| (fields.next()? == name.as_bytes()).then_some(fields))?.skip(1);
    let mut number = || {
        let text = std::str::from_utf8(fields.next()?).ok()?;
        text.parse().ok().filter(|number| !matches!(*number, 0 | u32::MAX))
    };
    Some(number().zip(number()))
}

#[cfg(test)]
mod tests {
    use super::find_ids;

    #[test]
    fn the_first_line_of_the_name_counts() {
        let passwd = b"root:x:0:0:root:/root:/bin/bash\n\
            # agent:x:7:7::/:\n\
            \xff:x:1:1::/:\n\
            agents:x:2:2::/:\n\
            agent:x:990:991:HAProxy agent checks:/:/usr/sbin/nologin\n\
            agent:x:5:5::/:\n";
        assert_eq!(find_ids(passwd, "agent"), Some(Some((990, 991))));
        assert_eq!(find_ids(passwd, "Agent"), None);
        assert_eq!(find_ids(passwd, "agent:x"), None);
        assert_eq!(find_ids(b"", "agent"), None);
    }

    #[test]
    fn root_and_invalid_ids_are_refused() {
        for line in [
            "a:x:0:5::/:",
            "a:x:5:0::/:",
            "a:x:00:5::/:",
            "a:x:4294967295:5::/:",
            "a:x:5:4294967295::/:",
            "a:x:-1:5::/:",
            "a:x:4294967296:5::/:",
            "a:x::5::/:",
            "a:x:5",
            "a:x:5:",
            "a:",
            "a",
            "a:x:0x5:5::/:",
            "a:x: 5:5::/:",
        ] {
            assert_eq!(find_ids(line.as_bytes(), "a"), Some(None), "{line}");
        }
    }
}
