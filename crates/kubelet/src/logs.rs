//! Container logs: CRI-format files in, what `kubectl logs` asked for out.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use runtime::RuntimeEvent;
use tokio::io::unix::AsyncFd;
use tokio::sync::{broadcast, mpsc};

/// The query of a log request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LogOptions {
    pub follow: bool,
    pub previous: bool,
    pub timestamps: bool,
    pub tail_lines: Option<usize>,
    pub limit_bytes: Option<usize>,
    pub since_seconds: Option<i64>,
    pub since_time: Option<Timestamp>,
}

impl LogOptions {
    pub fn parse(query: &[(String, String)]) -> Result<LogOptions, String> {
        let mut options = LogOptions::default();
        for (name, value) in query {
            let wrong = |_| format!("{name}={value:?} is not understood");
            let truth = || matches!(value.as_str(), "true" | "1");
            match name.as_str() {
                "follow" => options.follow = truth(),
                "previous" => options.previous = truth(),
                "timestamps" => options.timestamps = truth(),
                "tailLines" => options.tail_lines = Some(value.parse().map_err(|e: std::num::ParseIntError| wrong(e))?),
                "limitBytes" => {
                    options.limit_bytes = Some(value.parse().map_err(|e: std::num::ParseIntError| wrong(e))?);
                }
                "sinceSeconds" => {
                    options.since_seconds = Some(value.parse().map_err(|e: std::num::ParseIntError| wrong(e))?);
                }
                "sinceTime" => {
                    let time: Timestamp = value.parse().map_err(|_| format!("{name}={value:?} is no time"))?;
                    options.since_time = Some(time);
                }
                _ => {}
            }
        }
        Ok(options)
    }

    fn since(&self, now: Timestamp) -> Option<Timestamp> {
        self.since_time.or_else(|| now.checked_sub(SignedDuration::from_secs(self.since_seconds?)).ok())
    }
}

/// One line of a log file as it goes to the client; `None` when it is too old or no log line at all.
fn render(line: &[u8], options: &LogOptions, since: Option<Timestamp>) -> Option<Vec<u8>> {
    let mut parts = line.splitn(4, |b| *b == b' ');
    let (time, _stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
    let text = parts.next().unwrap_or_default();
    if let Some(since) = since {
        let at: Timestamp = std::str::from_utf8(time).ok()?.parse().ok()?;
        if at < since {
            return None;
        }
    }
    let mut out = Vec::with_capacity(line.len() + 1);
    if options.timestamps {
        out.extend_from_slice(time);
        out.push(b' ');
    }
    // A part of a line does not end it.
    let text = if tag == b"P" { text.strip_suffix(b"\n").unwrap_or(text) } else { text };
    out.extend_from_slice(text);
    Some(out)
}

/// Reads a log and sends it; with `follow`, goes on until `ended` says that nothing more can come, which is asked again
/// after each of `events`.
///
/// Returns when the client has gone, too.
pub async fn stream(
    path: PathBuf,
    options: LogOptions,
    ended: impl Fn() -> futures::future::BoxFuture<'static, bool>,
    mut events: broadcast::Receiver<RuntimeEvent>,
    sender: mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let since = options.since(Timestamp::now());
    let mut left = options.limit_bytes.unwrap_or(usize::MAX);
    // Watched before the first read: what comes in between is not missed.
    let watcher = if options.follow { Some(Watcher::new(&path)?) } else { None };
    let mut reader = Reader::open(&path)?;
    if let Some(lines) = options.tail_lines {
        reader.skip_to_tail(lines)?;
    }
    loop {
        // Asked before reading: what is written before the end is read after it.
        let over = !options.follow || ended().await;
        while let Some(line) = reader.next_line(&path)? {
            let Some(mut out) = render(&line, &options, since) else { continue };
            out.truncate(left);
            left -= out.len();
            if sender.send(Bytes::from(out)).await.is_err() || left == 0 {
                return Ok(());
            }
        }
        if over {
            return Ok(());
        }
        if let Some(watcher) = &watcher {
            tokio::select! {
                changed = watcher.changed() => changed?,
                // The container may have ended; an overrun says no less.
                _ = events.recv() => {}
                () = sender.closed() => return Ok(()),
            }
        }
    }
}

/// Whole lines of a file that grows and may be replaced.
struct Reader {
    file: BufReader<File>,
    partial: Vec<u8>,
    inode: u64,
}

impl Reader {
    fn open(path: &Path) -> io::Result<Reader> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        Ok(Reader { file: BufReader::new(file), partial: Vec::new(), inode })
    }

    fn next_line(&mut self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        loop {
            self.file.read_until(b'\n', &mut self.partial)?;
            if self.partial.ends_with(b"\n") {
                return Ok(Some(std::mem::take(&mut self.partial)));
            }
            // At the end. A rotated log goes on in a new file of the old name.
            match std::fs::metadata(path) {
                Ok(found) if found.ino() != self.inode => {
                    // The last lines of the old file may have come after the read above.
                    self.file.read_until(b'\n', &mut self.partial)?;
                    if self.partial.ends_with(b"\n") {
                        return Ok(Some(std::mem::take(&mut self.partial)));
                    }
                    *self = Reader::open(path)?;
                }
                _ => return Ok(None),
            }
        }
    }

    /// Positions the reader before the last `lines` lines.
    fn skip_to_tail(&mut self, lines: usize) -> io::Result<()> {
        let mut starts: VecDeque<u64> = VecDeque::new();
        let mut position = 0;
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = self.file.read_until(b'\n', &mut line)?;
            if n == 0 || !line.ends_with(b"\n") {
                break;
            }
            starts.push_back(position);
            position += n as u64;
            if starts.len() > lines {
                starts.pop_front();
            }
        }
        let start = if lines == 0 { position } else { starts.front().copied().unwrap_or(position) };
        self.file.seek(SeekFrom::Start(start))?;
        Ok(())
    }
}

/// Wakes when a log's directory changes.
struct Watcher(AsyncFd<Descriptor>);

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watcher {
    fn new(path: &Path) -> io::Result<Watcher> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        inotify
            .add_watch(directory, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)?;
        // The safe constructor: the descriptor lives as long as this value.
        #[allow(deprecated)]
        Ok(Watcher(AsyncFd::new(Descriptor(inotify))?))
    }

    async fn changed(&self) -> io::Result<()> {
        let mut guard = self.0.readable().await?;
        while self.0.get_ref().0.read_events().is_ok() {}
        guard.clear_ready();
        Ok(())
    }
}

/// The file of a container's newest run, or of the one before it.
pub fn find_file(root: &Path, namespace: &str, pod: &str, container: &str, previous: bool) -> Option<PathBuf> {
    let prefix = format!("{namespace}_{pod}_");
    let pods = std::fs::read_dir(root).ok()?.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(&prefix));
    // A name may have been used before; the newest directory is today's pod.
    let newest = pods.max_by_key(|e| e.metadata().and_then(|m| m.created()).ok())?;
    let directory = newest.path().join(container);
    let mut attempts: Vec<u32> = std::fs::read_dir(&directory)
        .ok()?
        .flatten()
        .filter_map(|e| e.file_name().to_string_lossy().strip_suffix(".log")?.parse().ok())
        .collect();
    attempts.sort_unstable();
    let attempt = if previous { attempts.pop().and(attempts.pop()) } else { attempts.pop() }?;
    Some(directory.join(format!("{attempt}.log")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "2026-01-01T00:00:01.000000001Z stdout F one\n\
                       2026-01-01T00:00:02.000000002Z stderr P tw\n\
                       2026-01-01T00:00:02.000000003Z stderr F o\n\
                       2026-01-01T00:00:03.000000003Z stdout F three\n";

    async fn read(query: &[(&str, &str)]) -> String {
        let path = std::env::temp_dir().join(format!("fairlead-logs-{}-{:?}", std::process::id(), query.len()));
        std::fs::write(&path, LOG).expect("written");
        let query: Vec<_> = query.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let options = LogOptions::parse(&query).expect("understood");
        let (sender, mut receiver) = mpsc::channel(100);
        let ended = || -> futures::future::BoxFuture<'static, bool> { Box::pin(async { true }) };
        stream(path, options, ended, broadcast::channel(1).1, sender).await.expect("read");
        let mut text = Vec::new();
        while let Some(bytes) = receiver.recv().await {
            text.extend_from_slice(&bytes);
        }
        String::from_utf8(text).expect("text")
    }

    #[tokio::test]
    async fn options_do_what_kubectl_documents() {
        assert_eq!(read(&[]).await, "one\ntwo\nthree\n");
        assert_eq!(read(&[("tailLines", "1")]).await, "three\n");
        assert_eq!(read(&[("tailLines", "0"), ("x", "")]).await, "");
        assert_eq!(read(&[("limitBytes", "5"), ("x", ""), ("y", "")]).await, "one\nt");
        assert_eq!(
            read(&[("sinceTime", "2026-01-01T00:00:03Z"), ("timestamps", "true"), ("x", ""), ("y", "")]).await,
            "2026-01-01T00:00:03.000000003Z three\n"
        );
        assert!(LogOptions::parse(&[("tailLines".into(), "x".into())]).is_err());
    }
}
