//! Splits a line of haproxy.cfg into words as HAProxy's `parse_line` does (HAProxy's manual, 2.2 "Quoting and
//! escaping"). Knows quotes, backslashes, comments and environment variables; knows no keyword.

use std::collections::HashMap;

/// The variables that a configuration may name.
pub type Environment = HashMap<String, String>;

/// The words of a line, and what was wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// The words, without the comment.
    pub words: Vec<String>,
    /// The variables that have no value here. They stay in the words as `${NAME}`.
    pub unset: Vec<String>,
    /// Why HAProxy refuses the line, if it does.
    pub wrong: Option<&'static str>,
}

/// The line that is being split.
struct Splitter<'a> {
    rest: &'a str,
    found: Words,
    word: String,
    in_word: bool,
}

/// Splits a line.
pub fn split(line: &str, environment: &Environment) -> Words {
    let mut splitter =
        Splitter { rest: line, found: Words::default(), word: String::new(), in_word: false };
    let mut quote = None;
    while let Some(c) = splitter.take() {
        match c {
            '#' if quote.is_none() => break,
            '"' | '\'' if quote.is_none() => {
                quote = Some(c);
                splitter.in_word = true;
            }
            '"' | '\'' if quote == Some(c) => quote = None,
            '\\' if quote != Some('\'') => splitter.escape(quote),
            '$' if quote == Some('"') => splitter.variable(environment),
            c if c.is_ascii_whitespace() && quote.is_none() => splitter.end(),
            c => splitter.put(c),
        }
    }
    if quote.is_some() {
        splitter.found.wrong = Some("a quote is not closed");
    }
    splitter.end();
    splitter.found
}

impl Splitter<'_> {
    fn take(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        Some(c)
    }

    fn put(&mut self, c: char) {
        self.word.push(c);
        self.in_word = true;
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.in_word) {
            self.found.words.push(std::mem::take(&mut self.word));
        }
    }

    /// Handles the characters after a backslash.
    fn escape(&mut self, quote: Option<char>) {
        let c = self.rest.chars().next();
        let meant = match c {
            Some(c @ (' ' | '\\' | '#' | '"' | '\'')) => Some(c),
            Some('$') if quote.is_some() => Some('$'),
            Some('n') => Some('\n'),
            Some('r') => Some('\r'),
            Some('t') => Some('\t'),
            Some('x') => {
                let byte = self.rest.get(1..3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
                match byte {
                    Some(byte) => {
                        self.rest = &self.rest[3..];
                        return self.put(char::from(byte));
                    }
                    None => self.found.wrong = Some("\\x is not followed by two digits"),
                }
                None
            }
            _ => None,
        };
        match meant {
            Some(meant) => {
                self.take();
                self.put(meant);
            }
            None => self.put('\\'),
        }
    }

    /// Expands `$NAME`, `${NAME}`, `${NAME-default}` or, as several words, `${NAME[*]}`.
    fn variable(&mut self, environment: &Environment) {
        let brace = self.rest.starts_with('{');
        let rest = if brace { &self.rest[1..] } else { self.rest };
        let length = rest.bytes().take_while(|b| b.is_ascii_alphanumeric() || b"_.".contains(b));
        let (name, rest) = rest.split_at(length.count());
        if name.is_empty() {
            self.found.wrong = Some("$ is not followed by the name of a variable");
            return self.put('$');
        }
        let (several, mut rest) = match rest.strip_prefix("[*]") {
            Some(rest) if brace => (true, rest),
            _ => (false, rest),
        };
        let mut default = None;
        if brace {
            let Some((before, after)) = rest.split_once('}') else {
                self.found.wrong = Some("${ is not closed");
                return self.put('$');
            };
            default = before.strip_prefix('-');
            rest = after;
        }
        self.rest = rest;
        let value = environment.get(name).map(String::as_str).or(default);
        let Some(value) = value else {
            self.found.unset.push(name.to_owned());
            return format!("${{{name}}}").chars().for_each(|c| self.put(c));
        };
        self.in_word |= !several;
        for c in value.chars() {
            if several && c.is_ascii_whitespace() { self.end() } else { self.put(c) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        let environment =
            [("PG1", "10.0.0.1"), ("ALL", "a b"), ("EMPTY", "")].map(|(n, v)| (n.into(), v.into()));
        split(line, &Environment::from(environment)).words
    }

    #[test]
    fn as_haproxy_splits_a_line() {
        for (line, wanted) in [
            ("", &[][..]),
            ("\t server\tpg1  pg1:5432 # check", &["server", "pg1", "pg1:5432"]),
            ("a b#c d", &["a", "b"]),
            (r"a\ b \# \\ \1", &["a b", "#", "\\", "\\1"]),
            (r#"agent-send "primary\n""#, &["agent-send", "primary\n"]),
            (r"agent-send primary\n", &["agent-send", "primary\n"]),
            (r"agent-send 'primary\n'", &["agent-send", "primary\\n"]),
            (r#"a "" '' "b c"d"#, &["a", "", "", "b cd"]),
            (
                r#""${PG1}:5432" "$PG1" ${PG1} '${PG1}'"#,
                &["10.0.0.1:5432", "10.0.0.1", "${PG1}", "${PG1}"],
            ),
            (r#""${NO-x}" "${ALL}" "${ALL[*]}" "\$PG1""#, &["x", "a b", "a", "b", "$PG1"]),
            (r#""${EMPTY}" x"#, &["", "x"]),
            (r#""${NO}" '"' "'" "\"" "#, &["${NO}", "\"", "'", "\""]),
            (r"\x41\x0a", &["A\n"]),
            ("server pg1 x\r", &["server", "pg1", "x"]),
        ] {
            assert_eq!(words(line), wanted, "{line}");
        }
    }

    #[test]
    fn what_haproxy_refuses() {
        for line in ["\"a", "'a", r"\xg1", r#""$""#, r#""${PG1""#] {
            assert!(split(line, &Environment::new()).wrong.is_some(), "{line}");
        }
        assert_eq!(split("\"${NO}\"", &Environment::new()).unset, ["NO"]);
    }
}
