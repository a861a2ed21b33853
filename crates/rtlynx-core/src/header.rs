//! Reads the CUDA sources, so that tests can hold the Rust twins of their structs and constants to them.

use std::collections::HashMap;
use std::iter::Peekable;
use std::vec::IntoIter;

/// `(name, value)` of the integer constants, in order: `constexpr int kName = value;`, of every width and sign, and with several of them in a declaration.
/// A value may be an expression of constants before it, and of those `given`; constants of anything else are left out.
pub(crate) fn constants<'a>(source: &'a str, given: &[(&'a str, i64)]) -> Vec<(&'a str, i64)> {
    let mut known: HashMap<&str, i64> = given.iter().copied().collect();
    let mut found = Vec::new();
    for line in source.lines().map(str::trim) {
        let line = line.strip_prefix("static ").unwrap_or(line);
        let Some(rest) = ["constexpr int ", "constexpr uint32_t "].iter().find_map(|start| line.strip_prefix(start)) else { continue };
        let Some((declaration, _)) = rest.split_once(';') else { continue };
        for (name, expression) in declaration.split(", ").filter_map(|one| one.split_once(" = ")) {
            // The first of a name is the one: later ones are of inner scopes.
            if let Some(value) = value(expression, &known).filter(|_| !known.contains_key(name)) {
                known.insert(name, value);
                found.push((name, value));
            }
        }
    }
    found
}

/// Of a C++ expression of integers, known names, `+ - * / % == ? :` and parentheses; `None` for any other.
fn value(expression: &str, known: &HashMap<&str, i64>) -> Option<i64> {
    let mut tokens = tokens(expression)?.into_iter().peekable();
    let value = choice(&mut tokens, known)?;
    tokens.next().is_none().then_some(value)
}

type Tokens<'a> = Peekable<IntoIter<&'a str>>;

fn tokens(mut text: &str) -> Option<Vec<&str>> {
    let mut tokens = Vec::new();
    while !text.trim_start().is_empty() {
        text = text.trim_start();
        let word = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
        let length = match word {
            0 if text.starts_with("==") => 2,
            0 if text.starts_with(['+', '-', '*', '/', '%', '?', ':', '(', ')']) => 1,
            0 => return None,
            _ => word,
        };
        tokens.push(&text[..length]);
        text = &text[length..];
    }
    Some(tokens)
}

fn choice(tokens: &mut Tokens, known: &HashMap<&str, i64>) -> Option<i64> {
    let condition = operation(tokens, known, 0)?;
    if tokens.next_if_eq(&"?").is_none() {
        return Some(condition);
    }
    let then = choice(tokens, known)?;
    tokens.next_if_eq(&":")?;
    let otherwise = choice(tokens, known)?;
    Some(if condition != 0 { then } else { otherwise })
}

/// From the loosest binding to the tightest.
const OPERATORS: [&[&str]; 3] = [&["=="], &["+", "-"], &["*", "/", "%"]];

fn operation(tokens: &mut Tokens, known: &HashMap<&str, i64>, level: usize) -> Option<i64> {
    let Some(operators) = OPERATORS.get(level) else { return operand(tokens, known) };
    let mut left = operation(tokens, known, level + 1)?;
    while let Some(operator) = tokens.next_if(|token| operators.contains(token)) {
        let right = operation(tokens, known, level + 1)?;
        left = match operator {
            "+" => left + right,
            "-" => left - right,
            "*" => left * right,
            "/" => left.checked_div(right)?,
            "%" => left.checked_rem(right)?,
            _ => (left == right).into(),
        };
    }
    Some(left)
}

fn operand(tokens: &mut Tokens, known: &HashMap<&str, i64>) -> Option<i64> {
    let token = tokens.next()?;
    if token == "(" {
        let value = choice(tokens, known)?;
        return tokens.next_if_eq(&")").map(|_| value);
    }
    let number = match token.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16),
        None => token.parse(),
    };
    number.ok().or_else(|| known.get(token).copied())
}

/// `(type, name)` of the fields of `struct NAME { ... };`, in order.
pub(crate) fn fields<'a>(header: &'a str, name: &str) -> Vec<(&'a str, &'a str)> {
    let start = format!("struct {name} {{");
    let (_, rest) = header.split_once(&start).unwrap_or_else(|| panic!("no `{start}` in the header"));
    let (body, _) = rest.split_once("};").expect("the end of the struct");
    let code = body.lines().map(|line| line.split("//").next().unwrap_or_default().trim());
    code.filter(|line| !line.is_empty())
        .map(|line| {
            let declaration = line.strip_suffix(';').expect("one `type name;` per line");
            let (kind, name) = declaration.rsplit_once(' ').expect("`type name`");
            (kind, name)
        })
        .collect()
}

/// The integers in the calls of a macro, call by call.
pub(crate) fn calls(source: &str, name: &str) -> Vec<Vec<i64>> {
    let lines = source.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('(')?.strip_suffix(')'));
    lines.map(|arguments| arguments.split(", ").map(|argument| argument.parse().expect("an integer")).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_computed_from_those_before_them() {
        let source = "
            constexpr int kWarps = 4, kThreads = 32 * (kWarps + 1);  // a warp more
            static constexpr int kCount = kGated ? 2 : kRank == 64 ? 3 : 4;
            constexpr uint32_t kWord = 0x1F;
            constexpr int kRow = kBytesOf<T> * 2;
            constexpr int kRest = 7 - 2 - 1 + 9 / 2 % 3;
            constexpr int kWarps = 9;
            constexpr float kRoot = 2;";
        let known = |given: &[_]| constants(source, given).into_iter().map(|(_, value)| value).collect::<Vec<_>>();
        assert_eq!(constants(source, &[]), [("kWarps", 4), ("kThreads", 160), ("kWord", 31), ("kRest", 5)]);
        assert_eq!(known(&[("kGated", 0), ("kRank", 64)]), [4, 160, 3, 31, 5]);
        assert_eq!(known(&[("kGated", 1), ("kRank", 64)]), [4, 160, 2, 31, 5]);
        assert_eq!(known(&[("kGated", 0), ("kRank", 16)]), [4, 160, 4, 31, 5]);
    }

    #[test]
    fn calls_are_those_of_the_macro_alone() {
        let source = "#define TILES(a, b) \\\n  TILE(bf16, a, b)\nTILES(1, 2)\nTILES(3, 4)\nTILES_OF(5, 6)\n";
        assert_eq!(calls(source, "TILES"), [[1, 2], [3, 4]]);
    }
}
