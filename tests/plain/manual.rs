//! The manuals, the completions and docs/reference.md have options, checks, states, exit statuses and journal lines from
//! one source. `UPDATE=1 cargo test --test plain manual` writes them again.

use crate::common::file;
use patroni_agent_check::decide::grace::Policy;
use patroni_agent_check::decide::table::look_up;
use patroni_agent_check::haproxy::question::Question;
use patroni_agent_check::haproxy::reply::{self, Otherwise, Reply, Verdict};
use patroni_agent_check::journal::news::{News, format_line};
use patroni_agent_check::options::{EXIT_STATUSES, OPTIONS, OptionRow, Options, help};
use patroni_agent_check::patroni::answer::{self, Answer};
use patroni_agent_check::patroni::check::{self, Check};
use patroni_agent_check::pools::options as pools;
use patroni_agent_check::pools::rules::RULES;
use patroni_agent_check::{NAME, VERSION};
use std::collections::HashSet;
use std::fmt::Write;
use std::fs;
use std::process::Command;
use std::time::Duration;

fn text(name: &str) -> String {
    fs::read_to_string(file(name)).unwrap_or_default()
}

/// Asserts that the file has this text, or writes it.
fn assert_current(name: &str, wanted: &str) {
    if std::env::var_os("UPDATE").is_some() {
        fs::write(file(name), wanted).expect(name);
    }
    assert!(text(name) == wanted, "{name} is old: UPDATE=1 cargo test --test plain manual");
}

/// Replaces the part of a text between two marks.
fn replace_between(text: &str, marks: [&str; 2], made: &str) -> String {
    let (before, rest) = text.split_once(marks[0]).unwrap_or_else(|| panic!("no {}", marks[0]));
    let (_, after) = rest.split_once(marks[1]).unwrap_or_else(|| panic!("no {}", marks[1]));
    [before, marks[0], made, marks[1], after].concat()
}

fn choices(option: &OptionRow) -> Option<Vec<&str>> {
    option.value.contains('|').then(|| option.value.split('|').collect())
}

fn roff(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq")
}

/// Converts Markdown's `code` to bold.
fn roff_of_markdown(text: &str) -> String {
    let mut parts = text.split('`').map(roff);
    let mut text = parts.next().expect("a part");
    for (number, part) in parts.enumerate() {
        text += if number % 2 == 0 { "\\fB" } else { "\\fR" };
        text += &part;
    }
    text
}

/// The rows of the table in README.md whose head begins so.
fn readme_rows(head: &str) -> Vec<Vec<String>> {
    let readme = text("README.md");
    let table = readme.split(head).nth(1).unwrap_or_else(|| panic!("no {head} in the README"));
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches(['|', ' ']).split(" | ").map(str::to_owned).collect()).collect()
}

#[test]
fn the_manual_is_current() {
    let version = concat!("\"", env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"), "\"");
    assert!(text("units/patroni-agent-check.8").contains(version), "its .TH line has {version}");
    let mut options = String::new();
    for option in OPTIONS {
        let short = option.short.map(|short| format!("\\fB\\-{short}\\fR, ")).unwrap_or_default();
        let value =
            if option.value.is_empty() { "" } else { &format!(" \\fI{}\\fR", roff(option.value)) };
        let _ = writeln!(options, ".TP\n{short}\\fB\\-\\-{}\\fR{value}", roff(option.long));
        let _ = match option.default {
            "" => writeln!(options, "{}", roff(option.meaning)),
            default => writeln!(options, "{} (default {})", roff(option.meaning), roff(default)),
        };
    }
    let mut decision = String::new();
    for row in readme_rows("| Patroni says | reply |") {
        let [says, reply] = &row[..] else { panic!("{row:?}") };
        let _ = writeln!(decision, ".TP\n{}\n{}", roff_of_markdown(reply), roff_of_markdown(says));
    }
    let mut exit = String::new();
    for (status, meaning) in EXIT_STATUSES {
        let _ = writeln!(exit, ".TP\n\\fB{status}\\fR\n{}", roff(meaning));
    }
    let checks: Vec<_> = check::names().map(|name| format!("\\fB{}\\fR", roff(name))).collect();
    let mut manual = text("units/patroni-agent-check.8");
    for (name, made) in [
        ("checks", format!("{}.\n", checks.join(",\n"))),
        ("options", options),
        ("decision", decision),
        ("exit", exit),
    ] {
        let marks = [format!(".\\\" begin {name}\n"), format!(".\\\" end {name}\n")];
        manual = replace_between(&manual, [&marks[0], &marks[1]], &made);
    }
    assert_current("units/patroni-agent-check.8", &manual);
}

#[test]
fn the_manual_of_patroni_pools_is_current() {
    let version = concat!("\"", env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"), "\"");
    let file = "units/patroni-pools.8";
    assert!(text(file).contains(version), "its .TH line has {version}");
    let mut commands = String::new();
    for (name, _, does) in pools::COMMANDS {
        let _ = writeln!(commands, ".TP\n\\fB{}\\fR\n{}", roff(name), roff(does));
    }
    let mut options = String::new();
    for option in pools::OPTIONS {
        let short = option.short.map(|short| format!("\\fB\\-{short}\\fR, ")).unwrap_or_default();
        let value =
            if option.value.is_empty() { "" } else { &format!(" \\fI{}\\fR", roff(option.value)) };
        let _ = writeln!(options, ".TP\n{short}\\fB\\-\\-{}\\fR{value}", roff(option.long));
        let _ = writeln!(options, "{}", roff(&option.meaning()));
    }
    let mut rules = String::new();
    for rule in RULES {
        let agent = if rule.agent { " (with the agent)" } else { "" };
        let _ = writeln!(rules, ".TP\n\\fB{}\\fR{agent}\n{}", roff(rule.name), roff(rule.why));
    }
    let mut exit = String::new();
    for (command, status, meaning) in pools::EXIT_STATUSES {
        let _ = writeln!(exit, ".TP\n\\fB{}\\fR, {status}\n{}", roff(command), roff(meaning));
    }
    let mut manual = text(file);
    for (name, made) in
        [("commands", commands), ("options", options), ("rules", rules), ("exit", exit)]
    {
        let marks = [format!(".\\\" begin {name}\n"), format!(".\\\" end {name}\n")];
        manual = replace_between(&manual, [&marks[0], &marks[1]], &made);
    }
    assert_current(file, &manual);
}

#[test]
fn the_reference_is_current() {
    let names: Vec<_> = check::names().map(|name| format!("`{name}`")).collect();
    let mut commands = "\n| command | what it does |\n|---|---|\n".to_owned();
    for (name, _, does) in pools::COMMANDS {
        let _ = writeln!(commands, "| `{name}` | {does} |");
    }
    let mut pools_options = "\n| option | meaning |\n|---|---|\n".to_owned();
    for option in pools::OPTIONS {
        let _ = writeln!(pools_options, "| `{}` | {} |", option.usage(), option.meaning());
    }
    let mut rules = "\n| rule | with the agent | why |\n|---|---|---|\n".to_owned();
    for rule in RULES {
        let agent = if rule.agent { "yes" } else { "" };
        let _ = writeln!(rules, "| `{}` | {agent} | {} |", rule.name, rule.why);
    }
    let mut options = "\n| option | default | meaning |\n|---|---|---|\n".to_owned();
    for option in OPTIONS {
        let default = match option.default {
            "" => String::new(),
            default => format!("`{default}`"),
        };
        let usage = option.usage().replace('|', "\\|");
        let meaning = option.meaning.replace('|', "\\|");
        let _ = writeln!(options, "| `{usage}` | {default} | {meaning} |");
    }
    let mut exit = "\n| exit status | meaning |\n|---|---|\n".to_owned();
    for (status, meaning) in EXIT_STATUSES {
        let _ = writeln!(exit, "| {status} | {meaning} |");
    }
    let mut pools_exit = "\n| command | exit status | meaning |\n|---|---|---|\n".to_owned();
    for (command, status, meaning) in pools::EXIT_STATUSES {
        let _ = writeln!(pools_exit, "| {command} | {status} | {meaning} |");
    }
    let file = "docs/reference.md";
    let mut reference = text(file);
    for (name, made) in [
        ("checks", format!("\n{}\n", names.join(", "))),
        ("options", options),
        ("exit", exit),
        ("states", states()),
        ("journal", journal_lines()),
        ("pools-commands", commands),
        ("pools-options", pools_options),
        ("pools-exit", pools_exit),
        ("pools-rules", rules),
    ] {
        let marks = [format!("<!-- begin {name} -->\n"), format!("\n<!-- end {name} -->")];
        reference = replace_between(&reference, [&marks[0], &marks[1]], &made);
    }
    assert_current(file, &reference);
}

/// The states of PostgreSQL that Patroni knows, and the reply to a check for the primary.
fn states() -> String {
    const STATES: [&str; 17] = [
        "running",
        "stopping",
        "restarting",
        "stopped",
        "starting",
        "creating replica",
        "initializing new cluster",
        "initalizing new cluster",
        "running custom bootstrap script",
        "starting after custom bootstrap",
        "crashed",
        "start failed",
        "restart failed",
        "stop failed",
        "initdb failed",
        "custom bootstrap failed",
        "unknown",
    ];
    let source = text("src/decide/table.rs");
    let (_, rows) = source.split_once("pub fn look_up").expect("the table");
    let (rows, _) = rows.split_once("fn matches_check").expect("its end");
    let words = rows.split('"').skip(1).step_by(2);
    let roles = ["primary", "master", "replica", "demoted", "uninitialized"];
    for state in words.filter(|word| !roles.contains(word)) {
        let prose = state.contains(['{', ',', '\'']);
        assert!(prose || STATES.contains(&state), "{state}");
    }
    let mut made = "\n| state | primary with the leader lock | primary without it | replica |\n|---|---|---|---|\n".to_owned();
    let question = Question { check: Check::default(), otherwise: Otherwise::Maint };
    for state in STATES {
        let replies =
            [(200, "primary"), (503, "primary"), (503, "replica")].map(|(status, role)| {
                let body = format!(r#"{{"state": "{state}", "role": "{role}"}}"#);
                let answer = answer::read(status, body.as_bytes()).expect("an answer");
                let answer = Answer { dcs_last_seen: Some(answer.date), ..answer };
                let reply = look_up(&question, Policy::default(), &Ok(answer));
                format!("`{}`", reply::words(reply.verdict))
            });
        let _ = writeln!(made, "| `{state}` | {} |", replies.join(" | "));
    }
    made
}

/// The lines about trouble in the journal.
fn journal_lines() -> String {
    let reply = |verdict, reason: &str| Reply {
        verdict,
        check: "primary".to_owned(),
        reason: reason.to_owned(),
    };
    let refused = reply(Verdict::Down, "Patroni 127.0.0.1:8008: connection refused");
    let ready = reply(Verdict::Ready, "primary, running, timeline 5");
    let mut made = "\n<!-- not run: the agent writes these lines -->\n\n".to_owned();
    for (reply, news) in [
        (&refused, News::Began),
        (&refused, News::Lasts(Duration::from_secs(63))),
        (&ready, News::Ended(Duration::from_millis(64_200))),
        (&reply(Verdict::Fail, ""), News::InvalidLine),
    ] {
        let (_, line) = format_line(reply, news, "10.0.0.1");
        let _ = writeln!(made, "    {}", line.replace(VERSION, env!("CARGO_PKG_VERSION")));
    }
    made
}

/// What completions need to know of an option.
struct Completed {
    short: Option<char>,
    long: &'static str,
    value: &'static str,
    meaning: String,
}

#[test]
fn the_completions_are_current() {
    let options = OPTIONS.iter().map(|&OptionRow { short, long, value, meaning, .. }| Completed {
        short,
        long,
        value,
        meaning: meaning.to_owned(),
    });
    let checks: Vec<_> = check::names().collect();
    completions(NAME, "src/options.rs", options.collect(), "check", &checks);
    let options = pools::OPTIONS.iter().map(|option| Completed {
        short: option.short,
        long: option.long,
        value: option.value,
        meaning: option.meaning(),
    });
    let commands: Vec<_> = pools::COMMANDS.iter().map(|(name, _, _)| *name).collect();
    completions(pools::NAME, "src/pools/options.rs", options.collect(), "command", &commands);
}

/// Makes the files of bash, zsh and fish for a program that takes these words besides its options.
fn completions(program: &str, table: &str, options: Vec<Completed>, word: &str, given: &[&str]) {
    let given = given.join(" ");
    let mut words = Vec::new();
    let (mut bash, mut zsh, mut fish) = (String::new(), String::new(), String::new());
    for Completed { short, long, value, meaning } in &options {
        let flags: Vec<_> =
            short.iter().map(|short| format!("-{short}")).chain([format!("--{long}")]).collect();
        words.extend(flags.clone());
        let choices: Option<Vec<&str>> = value.contains('|').then(|| value.split('|').collect());
        let (completes, zsh_value, fish_value) = match (choices, *value) {
            (Some(choices), _) => {
                let choices = choices.join(" ");
                let bash = format!("mapfile -t COMPREPLY < <(compgen -W '{choices}' -- \"$cur\")");
                (bash, format!(":{long}:({choices})"), format!(" -x -a '{choices}'"))
            }
            (_, "FILE") => {
                let bash = "mapfile -t COMPREPLY < <(compgen -f -- \"$cur\")".to_owned();
                (bash, format!(":{long}:_files"), " -r -F".to_owned())
            }
            (_, "") => (String::new(), String::new(), String::new()),
            _ => (":".to_owned(), format!(":{long}:"), " -x".to_owned()),
        };
        if !value.is_empty() {
            let flags = flags.join("|");
            let _ = writeln!(bash, "        {flags}) {completes} ;;");
        }
        let mut said = meaning.replace('\'', r"'\''");
        for special in ["[", "]", ":"] {
            said = said.replace(special, &format!("\\{special}"));
        }
        let name = match &flags[..] {
            [one] => format!("'{one}"),
            both => format!("'({})'{{{}}}'", both.join(" "), both.join(",")),
        };
        let _ = writeln!(zsh, "    {name}[{said}]{zsh_value}' \\");
        let letter = short.map(|short| format!(" -s {short}")).unwrap_or_default();
        let _ = writeln!(
            fish,
            "complete -c {program}{letter} -l {long}{fish_value} -d '{}'",
            meaning.replace('\'', r"\'")
        );
    }
    let (words, function) = (words.join(" "), program.replace('-', "_"));
    let made = format!("# Made by tests/plain/manual.rs from the table in {table}.");
    assert_current(
        &format!("units/packaging/completions/{program}.bash"),
        &format!(
            "{made}\n_{function}() {{\n    local cur=${{COMP_WORDS[COMP_CWORD]}}\n    \
             case ${{COMP_WORDS[COMP_CWORD - 1]}} in\n{bash}        *) mapfile -t COMPREPLY < \
             <(compgen -W '{words} {given}' -- \"$cur\") ;;\n    esac\n}}\n\
             complete -F _{function} {program}\n"
        ),
    );
    assert_current(
        &format!("units/packaging/completions/_{program}"),
        &format!("#compdef {program}\n{made}\n_arguments \\\n{zsh}    ':{word}:({given})'\n"),
    );
    assert_current(
        &format!("units/packaging/completions/{program}.fish"),
        &format!("{made}\ncomplete -c {program} -f\n{fish}complete -c {program} -a '{given}'\n"),
    );
}

/// Asks each shell what it completes.
#[test]
#[ignore = "needs zsh and fish: tests/run"]
fn the_shells_complete_options_and_checks() {
    let run = |command: &[&str]| {
        let output = Command::new(command[0]).args(&command[1..]).output().expect(command[0]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{command:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let [bash, zsh, fish] =
        ["patroni-agent-check.bash", "_patroni-agent-check", "patroni-agent-check.fish"]
            .map(|name| file("units/packaging/completions").join(name).display().to_string());
    let script = "source $0; COMP_WORDS=(x \"$@\"); COMP_CWORD=$#; _patroni_agent_check; echo \"${COMPREPLY[*]}\"";
    assert_eq!(run(&["bash", "-c", script, &bash, "--else", ""]), "maint drain down\n");
    assert_eq!(run(&["bash", "-c", script, &bash, "--unr"]), "--unreachable\n");
    assert_eq!(run(&["bash", "-c", script, &bash, "stand"]), "standby-leader standby_leader\n");
    let ask = |line: &str| {
        run(&["fish", "--no-config", "-c", &format!("source {fish}; complete -C '{line}'")])
    };
    assert!(ask("patroni-agent-check --else dr").starts_with("drain\t"));
    assert!(ask("patroni-agent-check --ins").contains("not verify Patroni's certificate"));
    // zsh's completion system needs a terminal, but its file can be read without one
    let tell = "_arguments() { print -rl -- \"$@\" }; source $0";
    let told = run(&["zsh", "-f", "-c", tell, &zsh]);
    assert!(told.contains("\n(-k --insecure)-k[do not verify Patroni's certificate]\n"), "{told}");
    assert!(
        told.contains("--else[state to report for a healthy node that does not match CHECK]:else:(maint drain down)"),
        "{told}"
    );
    assert!(told.contains("one line CHECK \\[maint|drain|down\\], at most"), "{told}");
}

/// With its default and with each of its choices.
#[test]
fn each_option_in_the_help_is_accepted() {
    for option in OPTIONS {
        assert!(help().contains(&option.usage()));
        for value in choices(option).unwrap_or(vec![option.default]) {
            if !value.is_empty() {
                let arguments = [format!("--{}", option.long).into(), value.into()];
                assert!(Options::parse(arguments).is_ok(), "--{} {value}", option.long);
            }
        }
    }
    for line in help().lines() {
        assert!(line.len() <= 80, "{line}");
    }
}

/// And no other command accepts them.
#[test]
fn each_command_of_patroni_pools_accepts_its_options() {
    let help = pools::help();
    for option in pools::OPTIONS.iter().filter(|option| !["help", "version"].contains(&option.long))
    {
        assert!(help.contains(&option.usage()));
        for (name, command, _) in pools::COMMANDS {
            let value = if option.value == "SECONDS" {
                "=1"
            } else if option.value.is_empty() {
                ""
            } else {
                "=x"
            };
            let parsed =
                pools::Options::parse([(*name).into(), format!("--{}{value}", option.long).into()]);
            let takes = option.commands.is_empty() || option.commands.contains(command);
            assert_eq!(parsed.is_ok(), takes, "{name} --{}", option.long);
        }
    }
    assert!(help.lines().all(|line| line.len() <= 80), "{help}");
    for wrong in [
        &["--wait", "1"][..],
        &["status", "--wait", "x"],
        &["status", "--wait", "99999"],
        &["x"],
        &["check", "x"],
        &[],
    ] {
        assert!(pools::Options::parse(wrong.iter().map(Into::into)).is_err(), "{wrong:?}");
    }
}

/// A manual without its escapes.
fn read_manual(manual: &str) -> String {
    let signs = [("\\-", "-"), ("\\e", "\\"), ("\\(aq", "'"), ("\\(dq", "\"")];
    let fonts = ["\\fB", "\\fI", "\\fR"].map(|font| (font, ""));
    let all = signs.into_iter().chain(fonts);
    all.fold(text(manual), |text, (escape, sign)| text.replace(escape, sign))
}

fn section<'a>(manual: &'a str, title: &str) -> &'a str {
    let rest = manual.split(&format!("\n.SH {title}\n")).nth(1);
    rest.unwrap_or_else(|| panic!("no {title}")).split("\n.SH ").next().expect("a section")
}

/// The wanted words of a text, in its order.
fn words(text: &str, wanted: impl Fn(&str) -> bool) -> Vec<&str> {
    let words = text.split(|sign: char| !sign.is_alphanumeric() && !"-_/.".contains(sign));
    words.map(|word| word.trim_end_matches('.')).filter(|word| wanted(word)).collect()
}

fn is_option(word: &str) -> bool {
    word.len() > 2 && word.starts_with("--")
}

/// What a manual and the help say of options, files and exit statuses is the same, and the examples are valid.
fn assert_manual(
    manual: &str,
    help: &str,
    options: &[&str],
    commands: &[&str],
    parse: impl Fn(Vec<&str>) -> bool,
) {
    let there: HashSet<_> = words(section(manual, "OPTIONS"), is_option).into_iter().collect();
    let options: Vec<_> = options.iter().map(|long| format!("--{long}")).collect();
    assert_eq!(there, options.iter().map(String::as_str).collect());
    assert_eq!(there, words(help, is_option).into_iter().collect());
    let mut known: HashSet<_> = OPTIONS.iter().map(|option| option.long).collect();
    known.extend(pools::OPTIONS.iter().map(|option| option.long));
    known.extend(["now", "test"]); // systemctl's, and cargo's in the first line
    for option in words(manual, is_option) {
        assert!(known.contains(&option[2..]), "nobody has {option}");
    }

    let files = section(manual, "FILES");
    for file in words(help, |word| word.starts_with("/run/")) {
        assert!(files.contains(file), "{file} is not among the files");
    }

    let is_status = |word: &str| ["0", "1", "2", "64"].contains(&word) || commands.contains(&word);
    let (_, statuses) = help.split_once("\nExit status").expect("the exit statuses");
    assert_eq!(words(statuses, is_status), words(section(manual, "EXIT STATUS"), is_status));

    let mut examples = 0;
    for line in section(manual, "EXAMPLES").lines() {
        let command = line.trim_start_matches(['$', '#', ' ']);
        if let Some(arguments) =
            command.strip_prefix("patroni-").or(command.strip_prefix("OPTIONS=\""))
        {
            let arguments: Vec<_> = arguments.split(['\'', '"', ' ']).collect();
            let skipped = usize::from(!command.starts_with("OPTIONS"));
            let given = arguments.into_iter().skip(skipped).filter(|word| !word.is_empty());
            assert!(parse(given.collect()), "{line}");
            examples += 1;
        }
    }
    assert!(examples > 1, "{examples} examples");
    assert!(!section(manual, "SEE ALSO").is_empty());
}

#[test]
fn the_manual_says_what_the_help_says() {
    let longs: Vec<_> = OPTIONS.iter().map(|option| option.long).collect();
    assert_manual(&read_manual("units/patroni-agent-check.8"), &help(), &longs, &[], |given| {
        Options::parse(given.into_iter().map(Into::into)).is_ok()
    });
}

#[test]
fn the_manual_of_patroni_pools_says_what_the_help_says() {
    let manual = read_manual("units/patroni-pools.8");
    let longs: Vec<_> = pools::OPTIONS.iter().map(|option| option.long).collect();
    let commands: Vec<_> = pools::COMMANDS.iter().map(|(name, _, _)| *name).collect();
    assert_manual(&manual, &pools::help(), &longs, &commands, |given| {
        pools::Options::parse(given.into_iter().map(Into::into)).is_ok()
    });
    let synopsis = section(&manual, "SYNOPSIS");
    for (name, command, _) in pools::COMMANDS {
        let (_, line) = synopsis.split_once(&format!("patroni-pools {name}\n")).expect(name);
        let line = line.lines().next().expect("its options");
        for option in pools::OPTIONS {
            let takes = option.commands.is_empty() && option.long == "file"
                || option.commands.contains(command);
            let usage =
                option.short.map_or(format!("[--{}", option.long), |short| format!("[-{short}"));
            assert_eq!(line.contains(&usage), takes, "{name} --{}", option.long);
        }
    }
}
