//! A date and a time of day, and how templates print them.

/// A moment in whatever time zone the caller means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    /// The year, as 2026.
    pub year: i32,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 60.
    pub second: u8,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const DAY_SECONDS: i64 = 86_400;

impl DateTime {
    /// The moment so many seconds after 1970 began in UTC. To get local time, add the zone's offset.
    pub fn from_unix(seconds: i64) -> Self {
        // Years beyond these are nobody's, and would overflow.
        let seconds = seconds.clamp(-60_000_000_000, 250_000_000_000);
        let (days, rest) = (seconds.div_euclid(DAY_SECONDS), seconds.rem_euclid(DAY_SECONDS));
        // days_from_civil and its inverse: https://howardhinnant.github.io/date_algorithms.html
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let of_era = shifted.rem_euclid(146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Self {
            year: year as i32,
            month: month as u8,
            day: day as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    /// As Python's `strftime` in the C locale. Letters that it does not know stay as they are.
    pub(crate) fn strftime(&self, format: &str) -> String {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut letter = chars.next();
            let padded = letter != Some('-');
            if !padded {
                letter = chars.next();
            }
            match letter {
                Some(letter) => self.field(letter, padded, &mut out),
                None => out.push('%'),
            }
        }
        out
    }

    /// The date as `2026-11-27`.
    pub(crate) fn date(&self) -> String {
        self.strftime("%Y-%m-%d")
    }

    /// The day before, at the same time.
    pub(crate) fn yesterday(&self) -> Self {
        let before = Self::from_unix((self.days() - 1) * DAY_SECONDS);
        Self { hour: self.hour, minute: self.minute, second: self.second, ..before }
    }

    fn field(&self, letter: char, padded: bool, out: &mut String) {
        let number = |n: i64, width: usize| {
            if padded { format!("{n:0width$}") } else { n.to_string() }
        };
        let month = MONTHS[usize::from(self.month.clamp(1, 12)) - 1];
        let weekday = WEEKDAYS[(self.days() + 4).rem_euclid(7) as usize];
        let hour12 = (i64::from(self.hour) + 11) % 12 + 1;
        *out += &match letter {
            'Y' => self.year.to_string(),
            'y' => number(i64::from(self.year.rem_euclid(100)), 2),
            'm' => number(self.month.into(), 2),
            'd' => number(self.day.into(), 2),
            'e' => format!("{:2}", self.day),
            'H' => number(self.hour.into(), 2),
            'I' => number(hour12, 2),
            'M' => number(self.minute.into(), 2),
            'S' => number(self.second.into(), 2),
            'p' => if self.hour < 12 { "AM" } else { "PM" }.into(),
            'B' => month.into(),
            'b' | 'h' => month[..3].into(),
            'A' => weekday.into(),
            'a' => weekday[..3].into(),
            'j' => {
                let first = Self { month: 1, day: 1, ..*self };
                number(self.days() - first.days() + 1, 3)
            }
            'F' => self.strftime("%Y-%m-%d"),
            'T' => self.strftime("%H:%M:%S"),
            'D' => self.strftime("%m/%d/%y"),
            '%' => "%".into(),
            other => format!("%{other}"),
        };
    }

    /// Days since 1970 began.
    fn days(&self) -> i64 {
        let (month, day) = (i64::from(self.month), i64::from(self.day));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let year_of_era = year.rem_euclid(400);
        era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year - 719_468
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_printed_as_python_does() {
        let moment = DateTime::from_unix(1_795_775_611);
        assert_eq!(moment.strftime("%d %b %Y, %A %H:%M:%S"), "27 Nov 2026, Friday 10:33:31");
        assert_eq!(
            moment.strftime("%-d/%-m/%y %I %p %j %B %a 100%% %Q %"),
            "27/11/26 10 AM 331 November Fri 100% %Q %"
        );
        assert_eq!(
            DateTime::from_unix(951_782_400).strftime("%F %T %j"),
            "2000-02-29 00:00:00 060"
        );
        assert_eq!(DateTime::from_unix(-1).strftime("%F %T %I%p"), "1969-12-31 23:59:59 11PM");
    }

    #[test]
    fn yesterday_crosses_months_and_years() {
        let first = DateTime { year: 2024, month: 3, day: 1, hour: 5, minute: 6, second: 7 };
        assert_eq!(first.yesterday().strftime("%F %T"), "2024-02-29 05:06:07");
        assert_eq!(DateTime { month: 1, ..first }.yesterday().date(), "2023-12-31");
    }

    #[test]
    fn absurd_moments_do_not_overflow() {
        let absurd =
            DateTime { year: i32::MIN, month: 255, day: 255, hour: 255, minute: 255, second: 255 };
        for moment in [absurd, DateTime::from_unix(i64::MAX), DateTime::from_unix(i64::MIN)] {
            moment.yesterday().strftime("%Y %j %A %I %y");
        }
    }
}
