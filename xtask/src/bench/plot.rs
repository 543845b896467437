//! A drawing of figures against a size, as an SVG file that README shows: one line for each series.

use std::fmt::Write as _;

/// What is drawn.
pub struct Plot {
    pub title: &'static str,
    /// Sizes are drawn by their logarithm.
    pub across: &'static str,
    /// Figures begin at zero.
    pub up: &'static str,
    pub series: Vec<Series>,
}

pub struct Series {
    pub name: String,
    /// Size and figure, by rising size.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 64.0;
/// Room for the names, which stand at the ends of their lines.
const RIGHT: f64 = 210.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 48.0;
/// Told apart also by people who do not tell red from green (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"];
/// Names closer to each other than this could not be read.
const LINE: f64 = 15.0;

impl Plot {
    pub fn svg(&self) -> String {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let (least, most) = points()
            .fold((f64::MAX, f64::MIN), |(least, most), (size, _)| (least.min(size.log10()), most.max(size.log10())));
        let step = step(points().fold(0.0, |highest: f64, (_, figure)| highest.max(*figure)));
        let steps = (points().fold(0.0, |highest: f64, (_, figure)| highest.max(*figure)) / step).ceil();
        let x = |size: f64| LEFT + (size.log10() - least) / (most - least).max(0.1) * (WIDTH - LEFT - RIGHT);
        let y = |figure: f64| HEIGHT - BOTTOM - figure / (step * steps) * (HEIGHT - TOP - BOTTOM);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"{LEFT}\" y=\"22\" font-size=\"14\">{}</text>\n",
            self.title
        );
        for number in 0..=steps as usize {
            let figure = step * number as f64;
            let at = y(figure);
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {at:.1}H{:.1}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" \
                 text-anchor=\"end\">{figure}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 4.0
            );
        }
        let mut sizes: Vec<f64> = points().map(|(size, _)| *size).collect();
        sizes.sort_by(f64::total_cmp);
        sizes.dedup();
        for size in sizes {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{size}</text>",
                x(size),
                HEIGHT - BOTTOM + 18.0
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n\
             <text transform=\"translate(16 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 10.0,
            self.across,
            (TOP + HEIGHT - BOTTOM) / 2.0,
            self.up
        );
        let mut names: Vec<(f64, usize)> = Vec::new();
        for (number, series) in self.series.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let at: Vec<String> =
                series.points.iter().map(|(size, figure)| format!("{:.1},{:.1}", x(*size), y(*figure))).collect();
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                at.join(" ")
            );
            for point in &at {
                let (x, y) = point.split_once(',').unwrap_or_default();
                let _ = writeln!(svg, "<circle cx=\"{x}\" cy=\"{y}\" r=\"3\" fill=\"{colour}\"/>");
            }
            names.extend(series.points.last().map(|(_, figure)| (y(*figure), number)));
        }
        names.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut free = TOP;
        for (wanted, number) in names {
            let at = wanted.max(free);
            free = at + LINE;
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{}\">{}</text>",
                WIDTH - RIGHT + 10.0,
                at + 4.0,
                COLOURS[number % COLOURS.len()],
                self.series[number].name
            );
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// A round number that goes into the highest figure four to ten times.
fn step(highest: f64) -> f64 {
    let power = 10f64.powf((highest.max(f64::MIN_POSITIVE) / 10.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|times| times * power).find(|step| highest / step <= 10.0).unwrap_or(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_each_series() {
        let series = |name: &str, high: f64| Series { name: name.into(), points: vec![(1e3, high), (1e4, 2.0 * high)] };
        let plot =
            Plot { title: "t", across: "Services", up: "µs", series: vec![series("one", 20.0), series("two", 45.0)] };
        let svg = plot.svg();
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert_eq!(svg.matches("<circle").count(), 4);
        // The highest point is at the highest line, and the names are on their own lines.
        assert!(svg.contains(">90</text>") && !svg.contains(">100</text>"), "{svg}");
        assert!(svg.contains(">one</text>") && svg.contains(">two</text>"));
    }

    #[test]
    fn steps_are_round() {
        for (highest, wanted) in [(90.0, 10.0), (45.0, 5.0), (130.0, 20.0), (7.3, 1.0), (1.0, 0.1)] {
            assert!((step(highest) - wanted).abs() < 1e-9, "{highest}: {}", step(highest));
        }
    }
}
