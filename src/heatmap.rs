//! The terminal heat map of which experts each prompt used.
//!
//! Each prompt has a panel: a row for each mixture-of-experts layer, a cell for each expert, as bright as the expert's
//! share of the layer's choices. With many experts a row is folded into several lines. [`render`] is a pure function
//! of its arguments; whether the terminal takes colour is for the caller to find out.

use std::fmt::Write as _;

/// The colours of viridis, dark to bright, as near as the 256-colour palette has them with ever greater luminance.
const VIRIDIS: [u8; 12] = [53, 54, 55, 61, 31, 36, 72, 77, 113, 149, 185, 227];
/// Shades for terminals without colour, dark to bright.
const SHADES: [char; 10] = [' ', '.', ':', '-', '=', '+', '*', '#', '%', '@'];
/// A favourite is chosen this many times as often as if all experts were equally likely, at least.
const FAVOURITE_FACTOR: f64 = 2.0;

/// Draws the heat map.
///
/// `counts[prompt][layer][expert]` says how often the router of a mixture-of-experts layer chose an expert while the
/// prompt was read and continued; `labels` names the prompts and `layers` numbers the layers as the model does. `width`
/// is that of the terminal in characters, of which at least 40 are used. With `color`, cells are blocks in
/// colours of the 256-colour palette; without, ASCII characters, darker for more.
///
/// ```
/// let counts = vec![vec![vec![6, 0, 1, 1]]];
/// let text = moewe::heatmap::render(&["json".to_owned()], &counts, &[1], 80, false);
/// assert!(text.contains("favourites: layer 1 e0 75%"));
/// ```
pub fn render(labels: &[String], counts: &[Vec<Vec<u32>>], layers: &[u32], width: usize, color: bool) -> String {
    let width = width.max(40);
    let experts = counts.iter().flatten().map(Vec::len).max().unwrap_or(0);
    let choices: u64 = counts.iter().flatten().flatten().map(|&n| u64::from(n)).sum();
    if experts == 0 || choices == 0 {
        return "No expert was chosen: there is nothing to draw.\n".to_owned();
    }
    let fold = Fold::new(experts, layers, width);
    let brightest = scale(counts);
    let mut out = String::new();
    let _ = writeln!(out, "Experts by prompt: a row for each layer, a cell for each of {experts} experts.");
    out += &legend(brightest, color);
    for (i, panel) in counts.iter().enumerate() {
        let label = labels.get(i).map_or("?", String::as_str);
        let total: u64 = panel.iter().flatten().map(|&n| u64::from(n)).sum();
        let _ = writeln!(out, "\n{label} ({total} choices)");
        out += &fold.ruler();
        for (l, row) in panel.iter().enumerate() {
            out += &fold.row(layers.get(l).copied(), row, brightest, color);
        }
        let _ = writeln!(out, "{}", favourites(i, counts, layers, width));
    }
    out
}

/// The share of a layer's choices that gets the brightest cell: the largest one anywhere, so that panels compare.
fn scale(counts: &[Vec<Vec<u32>>]) -> f64 {
    let shares = counts.iter().flatten().flat_map(|row| {
        let total = sum(row);
        row.iter().map(move |&n| share(n, total))
    });
    shares.fold(0.0, f64::max)
}

fn sum(row: &[u32]) -> u64 {
    row.iter().map(|&n| u64::from(n)).sum()
}

fn share(n: u32, total: u64) -> f64 {
    if total == 0 { 0.0 } else { f64::from(n) / total as f64 }
}

/// The scale with its unit.
fn legend(brightest: f64, color: bool) -> String {
    let cells: String = (0..20).map(|i| cell(f64::from(i) / 19.0, 1, color)).collect();
    format!("share of the layer's choices: 0% {cells} {:.0}%\n", 100.0 * brightest)
}

/// How a row of experts is laid out on lines.
struct Fold {
    /// Width of the layer labels, with the space behind.
    margin: usize,
    /// Characters for each expert.
    cell: usize,
    /// Experts on each line.
    per_line: usize,
    experts: usize,
}

impl Fold {
    fn new(experts: usize, layers: &[u32], width: usize) -> Self {
        let deepest = layers.iter().max().copied().unwrap_or(0).to_string().len();
        let label = "layer ".len() + deepest;
        // A folded row also says where each of its lines begins.
        let (whole, folded) = (label + 1, label + 1 + "e000 ".len());
        if experts <= width - whole {
            let cell = if experts * 2 <= width - whole { 2 } else { 1 };
            return Self { margin: whole, cell, per_line: experts, experts };
        }
        // Lines of 8, 16, 32, … experts are easy to count along.
        let per_line = 1 << (width - folded).ilog2();
        Self { margin: folded, cell: 1, per_line, experts }
    }

    /// Expert numbers above the columns.
    fn ruler(&self) -> String {
        let step = if self.cell == 2 { 4 } else { 8 };
        let mut line = " ".repeat(self.margin);
        for expert in (0..self.per_line).step_by(step) {
            let number = expert.to_string();
            let room = (self.per_line - expert).min(step) * self.cell;
            if number.len() < room || room >= self.cell && number.len() <= room {
                let _ = write!(line, "{number:room$}");
            }
        }
        line.truncate(line.trim_end().len());
        line + "\n"
    }

    fn row(&self, layer: Option<u32>, row: &[u32], brightest: f64, color: bool) -> String {
        let total = sum(row);
        let lines = self.experts.div_ceil(self.per_line);
        let mut out = String::new();
        for line in 0..lines {
            let begin = line * self.per_line;
            let name = match layer {
                Some(layer) if line == 0 => format!("layer {layer}"),
                _ => String::new(),
            };
            let margin = self.margin;
            if lines > 1 {
                let _ = write!(out, "{name:<0$} {begin:>4} ", margin - 6, begin = format!("e{begin}"));
            } else {
                let _ = write!(out, "{name:<margin$}");
            }
            for &chosen in row.iter().skip(begin).take(self.per_line) {
                out += &cell(share(chosen, total) / brightest, self.cell, color);
            }
            out.truncate(if color { out.len() } else { out.trim_end_matches(' ').len() });
            out.push('\n');
        }
        out
    }
}

/// A cell of brightness 0 to 1.
fn cell(level: f64, width: usize, color: bool) -> String {
    if color {
        format!("\x1b[38;5;{}m{}\x1b[0m", palette(level), "█".repeat(width))
    } else {
        // Anything that was chosen at all shows.
        let last = SHADES.len() - 1;
        let shade = if level > 0.0 { ((level * last as f64).round() as usize).clamp(1, last) } else { 0 };
        SHADES[shade].to_string().repeat(width)
    }
}

/// The colour of viridis at `level`.
fn palette(level: f64) -> u8 {
    VIRIDIS[(level.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64).round() as usize]
}

/// The experts that a prompt chose more than the other prompts did, most distinctive first, as many as fit the line.
fn favourites(prompt: usize, counts: &[Vec<Vec<u32>>], layers: &[u32], width: usize) -> String {
    let shares_of = |p: usize, l: usize, e: usize| {
        let row = counts[p].get(l).map_or(&[][..], Vec::as_slice);
        share(row.get(e).copied().unwrap_or(0), sum(row))
    };
    let mut found: Vec<(f64, f64, usize, usize)> = Vec::new();
    for (l, row) in counts[prompt].iter().enumerate() {
        for e in 0..row.len() {
            let own = shares_of(prompt, l, e);
            let others: f64 = (0..counts.len()).filter(|&p| p != prompt).map(|p| shares_of(p, l, e)).sum();
            let lead = own - others / (counts.len() - 1).max(1) as f64;
            if own * row.len() as f64 >= FAVOURITE_FACTOR && lead > 0.0 {
                found.push((lead, own, l, e));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.2, a.3).cmp(&(b.2, b.3))));
    let mut line = "favourites:".to_owned();
    for (i, (_, own, l, e)) in found.iter().enumerate() {
        let layer = layers.get(*l).map_or("?".to_owned(), u32::to_string);
        let comma = if i > 0 { "," } else { "" };
        let part = format!("{comma} layer {layer} e{e} {:.0}%", 100.0 * own);
        if line.len() + part.len() > width {
            break;
        }
        line += &part;
    }
    if found.is_empty() { line + " none stands out" } else { line }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prompt `p` prefers the experts from 5p on, the more so the deeper the layer.
    fn sample(prompts: usize, layers: usize, experts: usize) -> Vec<Vec<Vec<u32>>> {
        let count = |p: usize, l: usize, e: usize| {
            let base = (e * 7 + l * 3 + p) % 4;
            let favourite = e >= 5 * p && e < 5 * p + 2;
            (base + if favourite { 20 * (l + 1) } else { 0 }) as u32
        };
        let row = |p, l| (0..experts).map(|e| count(p, l, e)).collect();
        (0..prompts).map(|p| (0..layers).map(|l| row(p, l)).collect()).collect()
    }

    fn labels(names: &[&str]) -> Vec<String> {
        names.iter().map(|&n| n.to_owned()).collect()
    }

    #[test]
    fn a_small_model_in_ascii() {
        let text = render(&labels(&["english", "json"]), &sample(2, 3, 32), &[1, 2, 3], 80, false);
        insta::assert_snapshot!(text);
    }

    #[test]
    fn many_experts_are_folded() {
        let text = render(&labels(&["wgsl"]), &sample(1, 2, 256), &[3, 60], 100, false);
        insta::assert_snapshot!(text);
    }

    #[test]
    fn colours_go_from_dark_to_bright() {
        let text = render(&labels(&["math"]), &[vec![vec![0, 1, 2, 4]]], &[7], 80, true);
        insta::assert_snapshot!(text.replace('\x1b', "ESC"));
    }

    #[test]
    fn every_line_fits_the_terminal() {
        for width in [40, 57, 80, 120, 300] {
            for experts in [1, 4, 31, 64, 160, 256, 384] {
                let text = render(&labels(&["a", "b"]), &sample(2, 2, experts), &[1, 2], width, false);
                for line in text.lines() {
                    assert!(line.chars().count() <= width.max(75), "{width} {experts}: {line:?}");
                }
                let cells = render(&labels(&["a"]), &sample(1, 1, experts), &[1], width, true);
                let blocks = cells.matches("\x1b[0m").count();
                assert_eq!(blocks, 20 + experts, "legend and one cell for each expert");
            }
        }
    }

    #[test]
    fn nothing_to_draw_is_said() {
        for counts in [vec![], vec![vec![]], vec![vec![vec![]]], vec![vec![vec![0, 0]]]] {
            assert!(render(&labels(&["a"]), &counts, &[1], 80, true).contains("nothing to draw"));
        }
    }

    #[test]
    fn uneven_input_does_not_panic() {
        let counts = vec![vec![vec![1], vec![0; 9], vec![]], vec![vec![u32::MAX; 300]]];
        let text = render(&[], &counts, &[], 0, false);
        assert!(text.contains("? (1 choices)"), "{text}");
    }
}
