//! Amounts with a suffix: `500m`, `1Gi`, `2e3`; parsed exactly and written back in canonical form.

use std::fmt;
use std::str::FromStr;

/// An exact amount in nano units, with the family of suffix it was written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity {
    nano: i128,
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Format {
    Decimal,
    Binary,
    Exponent,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no quantity: write a number with an optional suffix such as m, k, Mi")]
pub struct QuantityError(String);

const NANO: i128 = 1_000_000_000;
const DECIMAL: [(&str, i32); 10] =
    [("n", -9), ("u", -6), ("m", -3), ("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15), ("E", 18)];
const BINARY: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

impl Quantity {
    pub fn from_milli(milli: i64) -> Self {
        Quantity { nano: i128::from(milli) * 1_000_000, format: Format::Decimal }
    }

    pub fn from_bytes(bytes: u64) -> Self {
        Quantity { nano: i128::from(bytes) * NANO, format: Format::Binary }
    }

    /// In whole units, rounded up as Kubernetes does.
    pub fn value(&self) -> i64 {
        i64::try_from((self.nano + NANO - 1).div_euclid(NANO)).unwrap_or(i64::MAX)
    }

    /// In thousandths, rounded up.
    pub fn milli(&self) -> i64 {
        i64::try_from((self.nano + 999_999).div_euclid(1_000_000)).unwrap_or(i64::MAX)
    }

    pub fn is_negative(&self) -> bool {
        self.nano < 0
    }
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let wrong = || QuantityError(text.into());
        let (negative, rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (digits, suffix) = rest.split_at(end);
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if whole.len() + fraction.len() == 0 || fraction.contains('.') || whole.len() > 24 {
            return Err(wrong());
        }
        let (numerator, power, format): (i128, i32, Format) = if let Some(i) = BINARY.iter().position(|s| *s == suffix)
        {
            (1i128 << (10 * (i + 1)), 0, Format::Binary)
        } else if let Some((_, power)) = DECIMAL.iter().find(|(s, _)| *s == suffix) {
            (1, *power, Format::Decimal)
        } else if let Some(exponent) = suffix.strip_prefix(['e', 'E']) {
            (1, exponent.parse().map_err(|_| wrong())?, Format::Exponent)
        } else {
            return Err(wrong());
        };
        if !(-18..=18).contains(&power) {
            return Err(wrong());
        }
        let fraction = &fraction[..fraction.len().min(18)];
        let mantissa: i128 = format!("{whole}{fraction}").parse().map_err(|_| wrong())?;
        let exponent = power + 9 - i32::try_from(fraction.len()).map_err(|_| wrong())?;
        let scaled = mantissa.checked_mul(numerator).ok_or_else(wrong)?;
        let nano = if exponent >= 0 {
            10i128.checked_pow(exponent.unsigned_abs()).and_then(|f| scaled.checked_mul(f)).ok_or_else(wrong)?
        } else {
            // Finer than nano is rounded up, as upstream does.
            let factor = 10i128.pow(exponent.unsigned_abs());
            (scaled + factor - 1) / factor
        };
        Ok(Quantity { nano: if negative { -nano } else { nano }, format })
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, nano) = if self.nano < 0 { ("-", -self.nano) } else { ("", self.nano) };
        if nano == 0 {
            return f.write_str("0");
        }
        // A binary amount below 1024, or with a fraction, is written in decimal.
        if self.format == Format::Binary && nano % NANO == 0 && nano / NANO >= 1024 {
            let mut value = nano / NANO;
            let mut suffix = "";
            for name in BINARY {
                if value % 1024 != 0 {
                    break;
                }
                value /= 1024;
                suffix = name;
            }
            return write!(f, "{sign}{value}{suffix}");
        }
        let (mut value, mut power) = (nano, -9);
        while value % 1000 == 0 && power < 18 {
            value /= 1000;
            power += 3;
        }
        if self.format == Format::Exponent {
            return if power == 0 { write!(f, "{sign}{value}") } else { write!(f, "{sign}{value}e{power}") };
        }
        let suffix = DECIMAL.iter().find(|(_, p)| *p == power).map_or("", |(s, _)| s);
        write!(f, "{sign}{value}{suffix}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_forms() {
        for (text, canonical, milli) in [
            ("0.5", "500m", 500),
            ("1000m", "1", 1000),
            ("1500m", "1500m", 1500),
            ("64Mi", "64Mi", 67_108_864_000),
            ("1024Mi", "1Gi", 1_073_741_824_000),
            ("1.5Gi", "1536Mi", 1_610_612_736_000),
            ("2e3", "2e3", 2_000_000),
            ("100k", "100k", 100_000_000),
            ("0", "0", 0),
        ] {
            let quantity: Quantity = text.parse().expect("the case is a quantity");
            assert_eq!(quantity.to_string(), canonical, "{text}");
            assert_eq!(quantity.milli(), milli, "{text}");
        }
        for text in ["", "x", "1x", "1.2.3", "--1", "1e", "1e99"] {
            assert!(text.parse::<Quantity>().is_err(), "{text}");
        }
    }
}
