//! Scripts as values: commands, and what they should print.

/// A file of steps.
pub struct Script {
    pub name: String,
    pub steps: Vec<Step>,
}

pub struct Step {
    pub line: usize,
    pub title: String,
    pub command: String,
    pub input: String,
    /// `$` or `!`
    pub succeeds: bool,
    /// Repeat until it fits.
    pub until: bool,
    /// What is known to differ from Kubernetes for now, if anything.
    pub known: Option<String>,
    pub expected: Vec<String>,
}

impl Script {
    pub fn parse(name: &str, text: &str) -> Result<Script, String> {
        let mut steps: Vec<Step> = Vec::new();
        let mut title = String::new();
        let mut known = None;
        let mut open = false;
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            if let Some(command) = line.strip_prefix("$ ").or_else(|| line.strip_prefix("! ")) {
                let mut step = Step::new(number, std::mem::take(&mut title), line.starts_with('$'), command);
                step.known = known.take();
                steps.push(step);
                open = true;
            } else if line.trim().is_empty() {
                open = false;
            } else if let Some(words) = line.strip_prefix('#').filter(|_| !open) {
                title = words.trim().to_owned();
            } else if let Some(words) = line.strip_prefix("known difference:").filter(|_| !open) {
                known = Some(words.trim().to_owned());
            } else {
                let step =
                    steps.last_mut().filter(|_| open).ok_or(format!("{name}:{number}: no command before {line:?}"))?;
                match line.strip_prefix("<").filter(|rest| rest.is_empty() || rest.starts_with(' ')) {
                    Some(input) => step.input.push_str(&format!("{}\n", input.strip_prefix(' ').unwrap_or(input))),
                    None => step.expected.push(line.to_owned()),
                }
            }
        }
        Ok(Script { name: name.to_owned(), steps })
    }
}

impl Step {
    fn new(line: usize, title: String, succeeds: bool, command: &str) -> Step {
        let command = command.trim_end();
        let (command, until) = match command.strip_suffix("(until)") {
            Some(command) => (command.trim_end(), true),
            None => (command, false),
        };
        let (input, expected) = (String::new(), Vec::new());
        Step { line, title, command: command.to_owned(), input, succeeds, until, known: None, expected }
    }

    pub fn fits(&self, output: &str) -> bool {
        if self.expected.is_empty() {
            return true;
        }
        let expected: Vec<String> = self.expected.iter().map(|line| squeezed(line)).collect();
        let seen: Vec<String> = output.trim_end().lines().map(squeezed).collect();
        lines_fit(&expected, &seen)
    }
}

/// Columns may move: any run of blanks counts as one.
fn squeezed(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A line `...` stands for any lines, none included.
fn lines_fit(expected: &[String], seen: &[String]) -> bool {
    walk(expected, seen, |line| line == "...", |pattern, line| line_fits(pattern, line))
}

/// `*` stands for any text, none included.
fn line_fits(pattern: &str, line: &str) -> bool {
    walk(pattern.as_bytes(), line.as_bytes(), |byte| *byte == b'*', |wanted, byte| wanted == byte)
}

/// Matches with wildcards, stepping back to the last one only: never slower than the product of both lengths.
fn walk<T>(pattern: &[T], seen: &[T], is_any: impl Fn(&T) -> bool, fits: impl Fn(&T, &T) -> bool) -> bool {
    let (mut p, mut s) = (0, 0);
    let mut any: Option<(usize, usize)> = None;
    while s < seen.len() {
        if p < pattern.len() && is_any(&pattern[p]) {
            any = Some((p, s));
            p += 1;
        } else if p < pattern.len() && fits(&pattern[p], &seen[s]) {
            p += 1;
            s += 1;
        } else if let Some((back, taken)) = any {
            p = back + 1;
            s = taken + 1;
            any = Some((back, s));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(is_any)
}

#[test]
fn a_script_is_read_as_it_is_written() {
    let text = "# Why.\n$ cat   (until)\n< apiVersion: v1\n<   kind: x\nNAME AGE\n...\nweb-* 5s\n\nknown difference: it works\n! false\n";
    let script = Script::parse("t", text).expect("a good script");
    let [first, second] = script.steps.as_slice() else { panic!("two steps") };
    assert_eq!((first.line, first.title.as_str(), first.command.as_str()), (2, "Why.", "cat"));
    assert!(first.until && first.succeeds && !second.succeeds && second.title.is_empty());
    assert_eq!(first.input, "apiVersion: v1\n  kind: x\n");
    assert!(first.fits("NAME     AGE\nweb-1    5s\n"));
    assert!(first.fits("NAME AGE\nother 5s\nweb- 5s"));
    assert!(!first.fits("NAME AGE\nweb-1 5s\nmore"));
    assert!(second.fits("anything") && first.known.is_none() && second.known.as_deref() == Some("it works"));
    assert!(Script::parse("t", "stray").is_err());
}

#[test]
fn a_star_stands_for_any_text() {
    let cases = [
        ("a*c", "abbc", true),
        ("a*c", "ac", true),
        ("*b*", "abba", true),
        ("a*c", "acb", false),
        ("ab", "abc", false),
    ];
    for (pattern, line, fits) in cases {
        assert_eq!(line_fits(pattern, line), fits, "{pattern} {line}");
    }
}
