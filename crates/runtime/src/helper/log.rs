//! Writes a container's output in CRI's log format: time, stream, F for a full line or P for part of one, the text.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Longer lines are cut, as containerd does.
const LINE_LIMIT: usize = 16 * 1024;
/// The kubelet's defaults for containerLogMaxSize and containerLogMaxFiles.
const FILE_LIMIT: u64 = 10 << 20;
const FILES: usize = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// One container's log file.
pub struct Log {
    path: PathBuf,
    file: File,
    size: u64,
    limit: u64,
    pending: [Vec<u8>; 2],
}

impl Log {
    pub fn open(path: &Path) -> io::Result<Log> {
        let file = File::options().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Log { path: path.to_owned(), file, size, limit: FILE_LIMIT, pending: [Vec::new(), Vec::new()] })
    }

    pub fn write(&mut self, stream: Stream, bytes: &[u8], now: jiff::Timestamp) -> io::Result<()> {
        let mut pending = std::mem::take(&mut self.pending[stream as usize]);
        pending.extend_from_slice(bytes);
        let lines = format_lines(stream, &mut pending, now);
        // A quiet container keeps no buffer.
        if pending.is_empty() {
            pending = Vec::new();
        }
        self.pending[stream as usize] = pending;
        self.append(&lines)
    }

    /// What is left without an end of line.
    pub fn finish(&mut self, now: jiff::Timestamp) -> io::Result<()> {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let rest = std::mem::take(&mut self.pending[stream as usize]);
            if !rest.is_empty() {
                let mut line = Vec::new();
                push_line(&mut line, stream, 'P', &rest, now);
                self.append(&line)?;
            }
        }
        Ok(())
    }

    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        if self.size > 0 && self.size + lines.len() as u64 > self.limit {
            self.rotate()?;
        }
        self.file.write_all(lines)?;
        self.size += lines.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let numbered = |n: usize| {
            let mut name = self.path.as_os_str().to_owned();
            name.push(format!(".{n}"));
            PathBuf::from(name)
        };
        for n in (1..FILES - 1).rev() {
            match fs::rename(numbered(n), numbered(n + 1)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        fs::rename(&self.path, numbered(1))?;
        self.file = File::options().create(true).append(true).open(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

/// Takes every whole line out of `pending`, and what is too long to wait for its end.
fn format_lines(stream: Stream, pending: &mut Vec<u8>, now: jiff::Timestamp) -> Vec<u8> {
    let mut out = Vec::with_capacity(pending.len() + 64);
    let mut start = 0;
    loop {
        let rest = &pending[start..];
        let window = &rest[..rest.len().min(LINE_LIMIT + 1)];
        if let Some(end) = window.iter().position(|b| *b == b'\n') {
            push_line(&mut out, stream, 'F', &rest[..end], now);
            start += end + 1;
        } else if rest.len() > LINE_LIMIT {
            push_line(&mut out, stream, 'P', &rest[..LINE_LIMIT], now);
            start += LINE_LIMIT;
        } else {
            break;
        }
    }
    pending.drain(..start);
    out
}

fn push_line(out: &mut Vec<u8>, stream: Stream, tag: char, text: &[u8], now: jiff::Timestamp) {
    let name = match stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    };
    // Always nine digits: lines then sort as they happened.
    let whole = jiff::Timestamp::from_second(now.as_second()).unwrap_or(now).to_string();
    let _ = write!(out, "{}.{:09}Z {name} {tag} ", whole.trim_end_matches('Z'), now.subsec_nanosecond());
    out.extend_from_slice(text);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> jiff::Timestamp {
        "2026-01-02T03:04:05.000000006Z".parse().expect("a time")
    }

    #[test]
    fn lines_are_whole_however_they_arrive() {
        let mut pending = b"one\ntw".to_vec();
        let first = format_lines(Stream::Stdout, &mut pending, now());
        assert_eq!(first, b"2026-01-02T03:04:05.000000006Z stdout F one\n");
        pending.extend(b"o\n");
        let second = format_lines(Stream::Stderr, &mut pending, now());
        assert_eq!(second, b"2026-01-02T03:04:05.000000006Z stderr F two\n");
        assert!(pending.is_empty());
    }

    #[test]
    fn a_long_line_comes_in_parts() {
        let mut pending = vec![b'x'; LINE_LIMIT * 2 + 5];
        pending.push(b'\n');
        let out = format_lines(Stream::Stdout, &mut pending, now());
        let tags: Vec<&str> =
            std::str::from_utf8(&out).expect("ascii").lines().filter_map(|l| l.split(' ').nth(2)).collect();
        assert_eq!(tags, ["P", "P", "F"]);
    }

    #[test]
    fn a_full_file_makes_room_and_loses_nothing() {
        let directory = std::env::temp_dir().join(format!("fairlead-log-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("made");
        let path = directory.join("0.log");
        let mut log = Log::open(&path).expect("opened");
        log.limit = 100;
        for _ in 0..3 {
            log.write(Stream::Stdout, b"0123456789012345678901234567890123456789\n", now()).expect("written");
        }
        let count = |p: &Path| fs::read_to_string(p).map(|t| t.lines().count()).unwrap_or(0);
        assert_eq!(count(&path) + count(&directory.join("0.log.1")) + count(&directory.join("0.log.2")), 3);
        fs::remove_dir_all(directory).expect("removed");
    }
}
