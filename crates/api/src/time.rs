//! RFC 3339 times as Kubernetes writes them: seconds for `Time`, microseconds for `MicroTime`, always UTC.

use jiff::Timestamp;

/// Parses any RFC 3339 time.
pub fn parse(text: &str) -> Option<Timestamp> {
    text.parse().ok()
}

/// `2026-11-20T12:00:00Z`
pub fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2026-11-20T12:00:00.000000Z`
pub fn micros(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// A time from seconds and nanoseconds since 1970, as protobuf carries it.
pub fn from_unix(seconds: i64, nanos: i32) -> Option<Timestamp> {
    Timestamp::new(seconds, nanos).ok()
}

/// How long ago, as kubectl's AGE column says it: `5s`, `3m20s`, `2d4h`.
pub fn age(since: Timestamp, now: Timestamp) -> String {
    human_duration(now.as_second() - since.as_second())
}

/// A duration in seconds as kubectl writes it.
pub fn human_duration(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let pair = |a: i64, au: &str, b: i64, bu: &str| if b == 0 { format!("{a}{au}") } else { format!("{a}{au}{b}{bu}") };
    match seconds {
        ..-1 => "<invalid>".into(),
        -1..=0 => "0s".into(),
        1..120 => format!("{seconds}s"),
        120..600 => pair(minutes, "m", seconds % 60, "s"),
        600..10800 => format!("{minutes}m"),
        10800..28800 => pair(hours, "h", minutes % 60, "m"),
        28800..172800 => format!("{hours}h"),
        172800..691200 => pair(days, "d", hours % 24, "h"),
        691200..63072000 => format!("{days}d"),
        _ if days < 365 * 8 => pair(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_as_kubernetes_does() {
        let time = parse("2026-11-20T12:00:01.5+01:00").expect("a valid time");
        assert_eq!(seconds(time), "2026-11-20T11:00:01Z");
        assert_eq!(micros(time), "2026-11-20T11:00:01.500000Z");
        assert_eq!(human_duration(200), "3m20s");
        assert_eq!(human_duration(187200), "2d4h");
    }
}
