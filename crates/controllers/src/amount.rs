//! Numbers that may be written as a part of another.

use serde_json::Value;

/// `3`, or `"25%"` of `total`; anything else is nothing.
pub fn int_or_percent(value: &Value, total: i64, round_up: bool) -> i64 {
    if let Some(number) = value.as_i64() {
        return number.max(0);
    }
    let percent = value.as_str().and_then(|t| t.strip_suffix('%')).and_then(|t| t.parse::<i64>().ok()).unwrap_or(0);
    let hundredths = total.saturating_mul(percent.max(0));
    if round_up { (hundredths + 99) / 100 } else { hundredths / 100 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn percentages_round_surge_up_and_unavailability_down() {
        for (value, total, up, expected) in [
            (json!("25%"), 3, true, 1),
            (json!("25%"), 3, false, 0),
            (json!("25%"), 4, true, 1),
            (json!("50%"), 5, false, 2),
            (json!("50%"), 5, true, 3),
            (json!(2), 9, true, 2),
            (json!("0%"), 9, true, 0),
        ] {
            assert_eq!(int_or_percent(&value, total, up), expected, "{value} of {total}");
        }
    }
}
