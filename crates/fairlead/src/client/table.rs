//! Server-side tables as text, aligned as kubectl aligns them.

use api::ObjectExt;
use serde_json::Value;

/// Between columns, and the least that a column takes with it.
const GAP: usize = 3;
const NARROWEST: usize = 6;

/// Which of a table's columns are shown, and what is put before them.
#[derive(Debug, Clone, Default)]
pub struct Style {
    /// Also the columns that only `-o wide` has.
    pub wide: bool,
    pub with_namespace: bool,
    /// `pod/` before each name, where one listing has several kinds.
    pub name_prefix: Option<String>,
    pub no_headers: bool,
}

/// Prints rows under columns that are as wide as anything seen so far: a watch keeps its columns where they were.
#[derive(Debug, Default)]
pub struct Printer {
    style: Style,
    headers: Vec<String>,
    /// Where the shown columns are in a row's cells.
    shown: Vec<usize>,
    names: Option<usize>,
    widths: Vec<usize>,
    has_headed: bool,
}

impl Printer {
    pub fn new(style: Style) -> Printer {
        Printer { style, ..Printer::default() }
    }

    /// The text of some tables of one kind. Headers come once, before the first row.
    pub fn print<'a>(&mut self, tables: impl IntoIterator<Item = &'a Value>) -> String {
        let mut lines: Vec<Vec<String>> = Vec::new();
        for table in tables {
            self.read_columns(table);
            for row in table.get("rows").and_then(Value::as_array).into_iter().flatten() {
                lines.push(self.line(row));
            }
        }
        if lines.is_empty() {
            return String::new();
        }
        if !self.has_headed && !self.style.no_headers {
            let mut headers = self.headers.clone();
            if self.style.with_namespace {
                headers.insert(0, "NAMESPACE".into());
            }
            lines.insert(0, headers);
        }
        self.has_headed = true;
        self.align(&lines)
    }

    /// Events of a watch after the first come without columns.
    fn read_columns(&mut self, table: &Value) {
        let columns = table.get("columnDefinitions").and_then(Value::as_array).filter(|c| !c.is_empty());
        let Some(columns) = columns.filter(|_| self.shown.is_empty()) else { return };
        for (index, column) in columns.iter().enumerate() {
            let is_wide = column.get("priority").and_then(Value::as_i64).unwrap_or(0) > 0;
            if is_wide && !self.style.wide {
                continue;
            }
            if column.text("/format") == "name" || column.text("/name") == "Name" {
                self.names.get_or_insert(index);
            }
            self.shown.push(index);
            self.headers.push(column.text("/name").to_uppercase());
        }
    }

    fn line(&self, row: &Value) -> Vec<String> {
        let cells = row.get("cells").and_then(Value::as_array);
        let mut line = Vec::with_capacity(self.shown.len() + 1);
        if self.style.with_namespace {
            line.push(row.text("/object/metadata/namespace").to_string());
        }
        for index in &self.shown {
            let text = cells.and_then(|c| c.get(*index)).map(cell).unwrap_or_default();
            match &self.style.name_prefix {
                Some(prefix) if self.names == Some(*index) => line.push(format!("{prefix}/{text}")),
                _ => line.push(text),
            }
        }
        line
    }

    /// The last column is not padded, so that lines end where their text does.
    fn align(&mut self, lines: &[Vec<String>]) -> String {
        for line in lines {
            self.widths.resize(self.widths.len().max(line.len()), NARROWEST);
            for (width, text) in self.widths.iter_mut().zip(line) {
                *width = (*width).max(text.chars().count() + GAP);
            }
        }
        let mut out = String::new();
        for line in lines {
            for (index, text) in line.iter().enumerate() {
                out.push_str(text);
                if index + 1 < line.len() {
                    let pad = self.widths[index] - text.chars().count();
                    out.extend(std::iter::repeat_n(' ', pad));
                }
            }
            out.push('\n');
        }
        out
    }
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => match text.split_once('\n') {
            // One object, one line.
            Some((first, _)) => format!("{first}..."),
            None => text.clone(),
        },
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn table(rows: &[[&str; 3]]) -> Value {
        let rows: Vec<Value> = rows
            .iter()
            .map(|cells| json!({"cells": cells, "object": {"metadata": {"name": cells[0], "namespace": "default"}}}))
            .collect();
        json!({"kind": "Table", "rows": rows, "columnDefinitions": [
            {"name": "Name", "format": "name", "priority": 0}, {"name": "Ready", "priority": 0},
            {"name": "Node", "priority": 1}]})
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_three() {
        let text = Printer::new(Style::default()).print([&table(&[["nginx-1", "1/1", "a"], ["b", "0/1", "a"]])]);
        assert_eq!(text, "NAME      READY\nnginx-1   1/1\nb         0/1\n");
    }

    #[test]
    fn wide_and_namespaced_tables_have_more_columns() {
        let style = Style { wide: true, with_namespace: true, ..Style::default() };
        let text = Printer::new(style).print([&table(&[["b", "1/1", "node-1"]])]);
        assert_eq!(text, "NAMESPACE   NAME   READY   NODE\ndefault     b      1/1     node-1\n");
    }

    #[test]
    fn a_watch_goes_on_under_the_same_columns_without_headers() {
        let mut printer = Printer::new(Style { name_prefix: Some("pod".into()), ..Style::default() });
        printer.print([&table(&[["nginx-1", "1/1", "a"]])]);
        let mut event = table(&[["b", "0/1", "a"]]);
        event["columnDefinitions"] = Value::Null;
        assert_eq!(printer.print([&event]), "pod/b         0/1\n");
        assert_eq!(printer.print([&table(&[])]), "");
    }

    #[test]
    fn cells_are_one_line() {
        assert_eq!(cell(&json!("a\nb")), "a...");
        assert_eq!(cell(&json!(3)), "3");
        assert_eq!(cell(&Value::Null), "");
    }
}
