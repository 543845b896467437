//! Cron expressions: when is the next time, when was the last.

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use std::collections::BTreeSet;

/// The minutes, hours and days at which something happens, in UTC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    minutes: BTreeSet<u8>,
    hours: BTreeSet<u8>,
    days: BTreeSet<u8>,
    months: BTreeSet<u8>,
    /// 0 is Sunday.
    weekdays: BTreeSet<u8>,
    /// Days of month and of week are alternatives when both are restricted.
    is_any_day: bool,
    is_any_weekday: bool,
}

const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// How far ahead or back a time is looked for: a leap day comes at least every eight years.
const DAYS: usize = 8 * 366;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unparseable schedule {text:?}: {why}")]
pub struct ScheduleError {
    text: String,
    why: String,
}

impl Schedule {
    /// Parses five fields, or a word such as `@hourly`.
    ///
    /// # Errors
    /// Says which field is wrong.
    pub fn parse(text: &str) -> Result<Schedule, ScheduleError> {
        let wrong = |why: String| ScheduleError { text: text.into(), why };
        let expanded = match text.trim() {
            "@yearly" | "@annually" => "0 0 1 1 *",
            "@monthly" => "0 0 1 * *",
            "@weekly" => "0 0 * * 0",
            "@daily" | "@midnight" => "0 0 * * *",
            "@hourly" => "0 * * * *",
            other => other,
        };
        let fields: Vec<&str> = expanded.split_whitespace().collect();
        let [minutes, hours, days, months, weekdays] = fields.as_slice() else {
            return Err(wrong(format!("expected 5 fields, found {}", fields.len())));
        };
        let is_any = |field: &str| field.starts_with('*') || field.starts_with('?');
        let mut weekday_set = parse_field(weekdays, 0, 7, &WEEKDAYS).map_err(wrong)?;
        if weekday_set.remove(&7) {
            weekday_set.insert(0);
        }
        Ok(Schedule {
            minutes: parse_field(minutes, 0, 59, &[]).map_err(wrong)?,
            hours: parse_field(hours, 0, 23, &[]).map_err(wrong)?,
            days: parse_field(days, 1, 31, &[]).map_err(wrong)?,
            months: parse_field(months, 1, 12, &MONTHS).map_err(wrong)?,
            weekdays: weekday_set,
            is_any_day: is_any(days),
            is_any_weekday: is_any(weekdays),
        })
    }

    fn has_day(&self, date: Date) -> bool {
        let day = u8::try_from(date.day()).is_ok_and(|d| self.days.contains(&d));
        let month = u8::try_from(date.month()).is_ok_and(|m| self.months.contains(&m));
        let weekday = u8::try_from(date.weekday().to_sunday_zero_offset()).is_ok_and(|w| self.weekdays.contains(&w));
        let is_meant = if self.is_any_day || self.is_any_weekday { day && weekday } else { day || weekday };
        month && is_meant
    }

    /// The minutes of a day at which it happens, in order.
    fn times(&self) -> impl DoubleEndedIterator<Item = i64> {
        self.hours.iter().flat_map(move |h| self.minutes.iter().map(move |m| i64::from(*h) * 60 + i64::from(*m)))
    }

    /// The first time after `time`.
    pub fn next(&self, time: Timestamp) -> Option<Timestamp> {
        let mut date = time.to_zoned(TimeZone::UTC).date();
        for _ in 0..DAYS {
            if self.has_day(date) {
                let midnight = midnight(date)?;
                if let Some(found) = self.times().map(|m| midnight + m * 60).find(|at| *at > time.as_second()) {
                    return Timestamp::from_second(found).ok();
                }
            }
            date = date.checked_add(1.day()).ok()?;
        }
        None
    }

    /// The last time at or before `time`.
    pub fn last(&self, time: Timestamp) -> Option<Timestamp> {
        let mut date = time.to_zoned(TimeZone::UTC).date();
        for _ in 0..DAYS {
            if self.has_day(date) {
                let midnight = midnight(date)?;
                if let Some(found) = self.times().rev().map(|m| midnight + m * 60).find(|at| *at <= time.as_second()) {
                    return Timestamp::from_second(found).ok();
                }
            }
            date = date.checked_sub(1.day()).ok()?;
        }
        None
    }
}

/// In seconds since 1970.
fn midnight(date: Date) -> Option<i64> {
    Some(date.to_zoned(TimeZone::UTC).ok()?.timestamp().as_second())
}

fn parse_field(field: &str, least: u8, most: u8, names: &[&str]) -> Result<BTreeSet<u8>, String> {
    let mut values = BTreeSet::new();
    for part in field.split(',') {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => {
                let step = step.parse::<u8>().ok().filter(|s| *s > 0);
                (range, Some(step.ok_or_else(|| format!("{part:?} has no step above zero"))?))
            }
            None => (part, None),
        };
        let value = |text: &str| -> Result<u8, String> {
            let named = names.iter().position(|n| n.eq_ignore_ascii_case(text)).and_then(|i| u8::try_from(i).ok());
            // Months are counted from one, weekdays from zero.
            let number = named.map(|i| i + least).or_else(|| text.parse().ok());
            number.filter(|n| (least..=most).contains(n)).ok_or_else(|| format!("{text:?} is not in {least}-{most}"))
        };
        let (from, to) = match range {
            "*" | "?" => (least, most),
            _ => match range.split_once('-') {
                Some((from, to)) => (value(from)?, value(to)?),
                // `5/15` runs on to the end.
                None if step.is_some() => (value(range)?, most),
                None => (value(range)?, value(range)?),
            },
        };
        if from > to {
            return Err(format!("{range:?} ends before it begins"));
        }
        values.extend((from..=to).step_by(usize::from(step.unwrap_or(1))));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, now, last, next) in [
            ("* * * * *", "2026-11-20T12:00:30Z", "2026-11-20T12:00:00Z", "2026-11-20T12:01:00Z"),
            ("*/15 * * * *", "2026-11-20T12:50:00Z", "2026-11-20T12:45:00Z", "2026-11-20T13:00:00Z"),
            ("0 3 * * *", "2026-11-20T12:00:00Z", "2026-11-20T03:00:00Z", "2026-11-21T03:00:00Z"),
            ("30 8-10/2 * * mon-fri", "2026-11-20T12:00:00Z", "2026-11-20T10:30:00Z", "2026-11-23T08:30:00Z"),
            ("@monthly", "2026-11-20T12:00:00Z", "2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z"),
            ("0 0 29 2 *", "2026-11-20T12:00:00Z", "2024-02-29T00:00:00Z", "2028-02-29T00:00:00Z"),
            ("0 0 13 * 5", "2026-11-20T12:00:00Z", "2026-11-20T00:00:00Z", "2026-11-27T00:00:00Z"),
            ("0 0 * * 7", "2026-11-20T12:00:00Z", "2026-11-15T00:00:00Z", "2026-11-22T00:00:00Z"),
        ] {
            let (schedule, now) = (Schedule::parse(text).expect(text), api::time::parse(now).expect("a time"));
            assert_eq!(schedule.last(now).map(api::time::seconds).as_deref(), Some(last), "{text}");
            assert_eq!(schedule.next(now).map(api::time::seconds).as_deref(), Some(next), "{text}");
        }
        for text in ["", "* * * *", "60 * * * *", "* * 0 * *", "a * * * *", "5-1 * * * *", "*/0 * * * *"] {
            assert!(Schedule::parse(text).is_err(), "{text}");
        }
        assert_eq!(Schedule::parse("0 0 30 2 *").map(|s| s.next(Timestamp::UNIX_EPOCH)), Ok(None));
    }
}
