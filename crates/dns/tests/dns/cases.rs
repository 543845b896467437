//! Reads case files: `# title`, then sections that start with `-- name --`.

pub struct Section {
    pub name: String,
    pub text: String,
}

pub struct Case {
    pub title: String,
    pub sections: Vec<Section>,
}

pub fn parse(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("# ") {
            cases.push(Case { title: title.to_owned(), sections: Vec::new() });
        } else if let Some(rest) = line.strip_prefix("-- ") {
            let (name, text) = rest.split_once(" --").unwrap_or((rest, ""));
            let mut text = text.trim_start().to_owned();
            if !text.is_empty() {
                text.push('\n');
            }
            let case = cases.last_mut().expect("a section stands below a title");
            case.sections.push(Section { name: name.to_owned(), text });
        } else if let Some(section) = cases.last_mut().and_then(|case| case.sections.last_mut()) {
            section.text.push_str(line);
            section.text.push('\n');
        }
    }
    cases
}
