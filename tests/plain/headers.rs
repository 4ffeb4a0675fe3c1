//! The first lines of each file of the agent are true: a file does not import what it "knows nothing of". No two files
//! import each other, not even through others.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What a file may know nothing of, and the paths that it must not name then.
const PARTIES: &[(&str, &[&str])] = &[
    ("Patroni", &["crate::patroni"]),
    ("HAProxy", &["crate::haproxy"]),
    ("HTTP", &["ureq", "crate::patroni::http"]),
    ("sockets", &["rustix::net", "std::net::Tcp", "std::net::Udp", "std::os::unix::net"]),
    ("files", &["std::fs", "crate::file"]),
    ("the clock", &["crate::clock", "std::time::Instant", "std::time::SystemTime"]),
    ("the command line", &["crate::options", "std::env::args"]),
    ("what an answer means", &["crate::decide"]),
];
/// Files that tie all others together, and the build script.
const EXEMPT: [&str; 4] = ["build.rs", "lib.rs", "main.rs", "sandbox/build.rs"];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries =
        fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let inside = |path: PathBuf| if path.is_dir() { sources(&path) } else { vec![path] };
    entries.flat_map(inside).collect()
}

/// The name below `src` and the text of each file.
fn read_sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let name = |path: &Path| path.strip_prefix(&root).expect("a source").display().to_string();
    let read = |path: PathBuf| (name(&path), fs::read_to_string(&path).expect("a source"));
    sources(&root).into_iter().map(read).collect()
}

/// Splits a `use` into its paths, such as `a::b` and `a::c` of `a::{b, c}`.
fn split_use(prefix: &str, tree: &str) -> Vec<String> {
    let Some((path, rest)) = tree.split_once('{') else { return vec![format!("{prefix}{tree}")] };
    let inner = rest.trim_end().strip_suffix('}').expect("a closing brace");
    let (mut parts, mut depth) = (vec![String::new()], 0);
    for c in inner.chars() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        match c {
            ',' if depth == 0 => parts.push(String::new()),
            c => parts.last_mut().expect("a part").push(c),
        }
    }
    let prefix = format!("{prefix}{path}");
    let parts = parts.iter().map(|part| part.trim()).filter(|part| !part.is_empty());
    parts.flat_map(|part| split_use(&prefix, part)).collect()
}

/// The paths that a file imports or names in full. `super` is the file's folder.
fn find_paths(file: &str, code: &str) -> Vec<String> {
    let folder = file.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("::{folder}"));
    let code: String = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let uses = format!("\n{code}");
    let uses = uses.split("\nuse ").skip(1).filter_map(|text| text.split_once(';'));
    let mut paths: Vec<_> = uses.flat_map(|(tree, _)| split_use("", tree)).collect();
    let is_path = |c: char| c.is_alphanumeric() || matches!(c, '_' | ':');
    paths.extend(code.split(|c| !is_path(c)).filter(|word| word.contains("::")).map(str::to_owned));
    paths.iter().map(|path| path.replace("super", &format!("crate{folder}"))).collect()
}

#[test]
fn no_file_imports_what_its_header_says_it_knows_nothing_of() {
    let mut seen = 0;
    for (file, text) in read_sources() {
        if file.starts_with("pools") || file.starts_with("bin") || EXEMPT.contains(&file.as_str()) {
            continue;
        }
        let header: Vec<_> = text.lines().map_while(|line| line.strip_prefix("//! ")).collect();
        assert!((1..=3).contains(&header.len()), "{file}: {} lines of header", header.len());
        let header = header.join(" ");
        let (_, unknown) = header.split_once(" Knows nothing of ").expect(&file);
        let unknown = unknown.strip_suffix('.').expect(&file).replace(" and ", ", ");
        let code = text.split("#[cfg(test)]").next().expect("code");
        let named = find_paths(&file, code);
        for party in unknown.split(", ") {
            let (_, paths) = PARTIES.iter().find(|(name, _)| *name == party).unwrap_or_else(|| {
                panic!("{file}: what does it import that knows of {party}?");
            });
            for path in paths.iter() {
                let known = named.iter().find(|name| name.starts_with(path));
                assert_eq!(known, None, "{file} says that it knows nothing of {party}");
            }
            seen += 1;
        }
    }
    assert!(seen > 40, "{seen}");
}

#[test]
fn no_files_import_each_other() {
    let mut files = BTreeMap::new();
    for (file, text) in read_sources() {
        let code = text.split("#[cfg(test)]").next().expect("code");
        let name = file.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::");
        // a folder's first file declares the others of the folder
        let own = format!("crate::{name}::");
        let named = find_paths(&file, code).into_iter().filter(|path| !path.starts_with(&own));
        files.insert(format!("crate::{name}"), named.collect::<Vec<_>>());
    }
    assert!(files.len() > 50, "{}", files.len());
    // a path names the longest file that it begins with
    let names: Vec<_> = files.keys().cloned().collect();
    let file_of = |path: &str| {
        let inside =
            |name: &&String| path == name.as_str() || path.starts_with(&format!("{name}::"));
        names.iter().filter(inside).max_by_key(|name| name.len())
    };
    while let Some(done) = files.iter().find_map(|(name, named)| {
        let left = |other: &String| other != name && files.contains_key(other);
        (!named.iter().filter_map(|path| file_of(path)).any(left)).then(|| name.clone())
    }) {
        files.remove(&done);
    }
    assert_eq!(files.keys().collect::<Vec<_>>(), Vec::<&String>::new(), "import each other");
}

#[test]
fn a_path_is_seen_in_each_way_of_importing_it() {
    let paths = split_use("", "crate::a::{self, b::{C, D as E}, f}");
    assert_eq!(paths, ["crate::a::self", "crate::a::b::C", "crate::a::b::D as E", "crate::a::f"]);
    let code = "\nuse super::http;\nfn f() { std::fs::read(x) } // crate::run\n";
    let named = find_paths("patroni/ask.rs", code);
    assert!(named.contains(&"crate::patroni::http".to_owned()), "{named:?}");
    assert!(named.contains(&"std::fs::read".to_owned()), "{named:?}");
}
