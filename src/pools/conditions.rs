//! Evaluates the conditions of `.if` and `.elif` (HAProxy's manual, 2.4 "Conditional blocks"). Knows the conditions
//! that need only the environment and HAProxy's version, and reports all others as unknown.

use crate::pools::words::Environment;

/// HAProxy's version, such as 2.6.12.
pub type Version = Vec<u32>;

/// Reads a version. Text after the numbers is ignored.
pub fn version(text: &str) -> Option<Version> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text[..end].trim_end_matches('.').split('.').map(|part| part.parse().ok()).collect()
}

/// Whether the condition holds; none if this program cannot know.
pub fn holds(text: &str, environment: &Environment, haproxy: Option<&Version>) -> Option<bool> {
    let text = text.trim();
    if let Some((one, other)) = outside(text, "||") {
        return match (holds(one, environment, haproxy), holds(other, environment, haproxy)) {
            (Some(true), _) | (_, Some(true)) => Some(true),
            (Some(false), Some(false)) => Some(false),
            _ => None,
        };
    }
    if let Some((one, other)) = outside(text, "&&") {
        return match (holds(one, environment, haproxy), holds(other, environment, haproxy)) {
            (Some(false), _) | (_, Some(false)) => Some(false),
            (Some(true), Some(true)) => Some(true),
            _ => None,
        };
    }
    if let Some(rest) = text.strip_prefix('!') {
        return holds(rest, environment, haproxy).map(|holds| !holds);
    }
    if text.is_empty() {
        return Some(false);
    }
    if let Ok(number) = text.parse::<i64>() {
        return Some(number != 0);
    }
    let (name, arguments) = text.strip_suffix(')')?.split_once('(')?;
    if name.is_empty() {
        return holds(arguments, environment, haproxy);
    }
    let mut arguments = arguments.split(',').map(str::trim);
    let first = arguments.next()?;
    let second = arguments.next();
    match name.trim() {
        "defined" => Some(environment.contains_key(first)),
        "streq" => Some(first == second?),
        "strneq" => Some(first != second?),
        "strstr" => Some(first.contains(second?)),
        "version_atleast" => Some(*haproxy? >= version(first)?),
        "version_before" => Some(*haproxy? < version(first)?),
        _ => None,
    }
}

/// The texts before and after the first `sign` that is not in parentheses.
fn outside<'a>(text: &'a str, sign: &str) -> Option<(&'a str, &'a str)> {
    let mut depth = 0_i32;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth == 0 && text[at..].starts_with(sign) => {
                return Some((&text[..at], &text[at + sign.len()..]));
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_known() {
        let environment = Environment::from([("A".to_owned(), "b".to_owned())]);
        let haproxy = version("2.6.12-1+deb12u4").expect("a version");
        for (text, wanted) in [
            ("", Some(false)),
            ("0", Some(false)),
            ("1", Some(true)),
            ("!1", Some(false)),
            ("defined(A)", Some(true)),
            ("defined(B) || version_atleast(2.6)", Some(true)),
            ("version_atleast(2.9)", Some(false)),
            ("version_before(2.6.13)", Some(true)),
            ("streq(b,b) && !(strneq(b,b))", Some(true)),
            ("feature(OPENSSL)", None),
            ("feature(OPENSSL) && 0", Some(false)),
            ("feature(OPENSSL) || 1", Some(true)),
            ("nonsense", None),
            (")(", None),
        ] {
            assert_eq!(holds(text, &environment, Some(&haproxy)), wanted, "{text}");
        }
        assert_eq!(holds("version_atleast(2.9)", &environment, None), None);
    }
}
