//! Reads the CUDA headers, so that tests can hold the Rust twins of their structs and constants to them.

/// `constexpr int kName = value;` declarations, in order.
pub(crate) fn constants(header: &str) -> Vec<(&str, i64)> {
    let declarations = header.lines().filter_map(|line| line.trim().strip_prefix("constexpr int "));
    declarations
        .map(|declaration| {
            let (name, rest) = declaration.split_once(" = ").expect("`name = value`");
            let value = rest.split_once(';').expect("`;` after the value").0;
            (name, value.parse().expect("an integer"))
        })
        .collect()
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
