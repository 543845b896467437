//! Reads case files.

use serde_json::Value;

pub struct Section {
    /// The words between the dashes.
    pub words: Vec<String>,
    pub text: String,
}

pub struct Case {
    pub title: String,
    pub sections: Vec<Section>,
}

impl Section {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|problem| panic!("{problem} in\n{}", self.text))
    }
}

impl Case {
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.words[0] == name)
    }

    pub fn json(&self, name: &str) -> Value {
        self.section(name).unwrap_or_else(|| panic!("{} lacks -- {name} --", self.title)).json()
    }
}

pub fn parse(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("# ") {
            cases.push(Case { title: title.to_owned(), sections: Vec::new() });
        } else if let Some(rest) = line.strip_prefix("-- ") {
            let (words, text) = rest.split_once(" --").unwrap_or((rest, ""));
            let words = words.split_whitespace().map(str::to_owned).collect();
            let case = cases.last_mut().expect("a section stands below a title");
            let mut text = text.trim_start().to_owned();
            if !text.is_empty() {
                text.push('\n');
            }
            case.sections.push(Section { words, text });
        } else if let Some(section) = cases.last_mut().and_then(|case| case.sections.last_mut()) {
            section.text.push_str(line);
            section.text.push('\n');
        }
    }
    cases
}
