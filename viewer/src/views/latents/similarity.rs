//! Which tokens have latents that point the same way.

use std::ops::Range;

use egui::Ui;

use crate::analysis::latents::{cosines, similarity, size_quantile};
use crate::heat::{Grid, HeatMap, Scale, Spec, number};
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::view::Cx;

use super::{Origin, Rows, Shown};

/// Rows of the map at most.
const MOST: usize = 512;
/// The share of the cosines that the scale's ends enclose.
const ENCLOSED: f64 = 0.98;
/// Neighbours that are listed.
const LISTED: usize = 24;

/// Which part of a long text is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Part {
    /// All of it; tokens share rows.
    #[default]
    Whole,
    /// The tokens around the selected one.
    Around,
}

#[derive(Default)]
pub(super) struct Similarity {
    part: Part,
    map: Latest<(Origin, Range<usize>), Grid>,
    heat: HeatMap,
    nearest: Latest<(Origin, u32), Vec<(usize, f32)>>,
}

/// The tokens that are compared, and how many share a row.
fn window(part: Part, tokens: usize, selected: Option<u32>) -> (Range<usize>, usize) {
    if tokens <= MOST {
        return (0..tokens, 1);
    }
    match part {
        Part::Whole => (0..tokens, tokens.div_ceil(MOST)),
        Part::Around => {
            // In steps, so that not every move of the selection makes another map.
            let first = (selected.unwrap_or(0) as usize).saturating_sub(MOST / 2);
            let first = (first - first % (MOST / 8)).min(tokens - MOST);
            (first..first + MOST, 1)
        }
    }
}

fn map(rows: &Rows, tokens: &Range<usize>, pool: usize) -> Grid {
    let cells = similarity(tokens.len(), rows.dim(), pool, |at| rows.row(tokens.start + at));
    let count = tokens.len().div_ceil(pool);
    // The diagonal is 1 (or nearly) and says nothing; the scale is for the others.
    let others: Vec<f32> = (0..cells.len()).filter(|at| at / count != at % count).map(|at| cells[at]).collect();
    let end = size_quantile(&others, ENCLOSED).map_or(1.0, |end| (end * 20.0).ceil() / 20.0).clamp(0.05, 1.0);
    Grid { rows: count, columns: count, cells: cells.into(), range: (-end, end) }
}

/// The tokens most similar to one, without itself.
fn nearest(rows: &Rows, token: usize) -> Vec<(usize, f32)> {
    let mut found: Vec<(usize, f32)> = cosines(rows.tokens, token, |at| rows.row(at))
        .into_iter()
        .enumerate()
        .filter(|(at, cosine)| *at != token && cosine.is_finite())
        .collect();
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    found.truncate(LISTED);
    found
}

impl Similarity {
    pub(super) fn show(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, shown: &Shown<'_>) {
        let tokens = shown.rows.tokens;
        ui.horizontal_wrapped(|ui| {
            ui.label("Cosine similarity between tokens").on_hover_text(
                "1 if two tokens' rows point the same way, 0 if they have nothing in common, −1 if they are opposite.",
            );
            if tokens > MOST {
                ui.selectable_value(&mut self.part, Part::Whole, "whole text");
                ui.selectable_value(&mut self.part, Part::Around, format!("{MOST} around the selection"));
            }
        });
        let (range, pool) = window(self.part, tokens, cx.selection.token);
        let key = (shown.origin, range.clone());
        let (rows, of) = (shown.rows.clone(), range.clone());
        let Some(grid) = self.map.get(ui.ctx(), &key, move || map(&rows, &of, pool)) else {
            ui.spinner();
            return;
        };
        let heat = &mut self.heat;
        let listing = &mut self.nearest;
        let height = ui.available_height();
        ui.horizontal_top(|ui| {
            let side = (height - 40.0).min(ui.available_width() - 240.0).max(200.0);
            ui.vertical(|ui| {
                ui.set_width(side);
                matrix(ui, cx, shown, (grid, heat), (&range, pool), side - 40.0);
            });
            ui.separator();
            ui.vertical(|ui| neighbours(ui, cx, shown, listing));
        });
    }

    /// Cosines of the window that is shown, and which tokens they are of.
    pub(super) fn tables(&self, name: &str, rows: &Rows, selected: Option<u32>) -> Vec<Table> {
        let (range, pool) = window(self.part, rows.tokens, selected);
        let count = range.len().div_ceil(pool);
        let cells = similarity(range.len(), rows.dim(), pool, |at| rows.row(range.start + at));
        let firsts = (0..count).map(|row| (range.start + row * pool) as i64).collect();
        vec![
            Table::integers(format!("{name}.similarity_first_token"), &[("row", count)], firsts),
            Table::floats(format!("{name}.similarity"), &[("row", count), ("column", count)], cells),
        ]
    }

    pub(super) fn is_busy(&self) -> bool {
        self.map.is_busy() || self.nearest.is_busy()
    }
}

fn matrix(
    ui: &mut Ui,
    cx: &mut Cx<'_>,
    shown: &Shown<'_>,
    (grid, heat): (&Grid, &mut HeatMap),
    (range, pool): (&Range<usize>, usize),
    height: f32,
) {
    let block = |row: usize| {
        let first = range.start + row * pool;
        if pool == 1 {
            shown.token(cx.subject, first)
        } else {
            format!("{first} to {}", (first + pool).min(range.end) - 1)
        }
    };
    let tooltip = |row: usize, column: usize| {
        let cosine = grid.get(row, column).filter(|cosine| !cosine.is_nan());
        let cosine = cosine.map_or("no row".to_owned(), |cosine| format!("cosine {cosine:.3}"));
        let mean = if pool == 1 { "" } else { " (mean over pairs)" };
        format!("{} and {}: {cosine}{mean}", block(row), block(column))
    };
    let axis = match (pool, range.start) {
        (1, 0) => "token".to_owned(),
        (1, start) => format!("token − {start}"),
        _ => format!("block of {pool} tokens"),
    };
    let beyond = if grid.range.1 < 1.0 { " (stronger ones look like the ends)" } else { "" };
    let row_of = |token: u32| (token as usize).checked_sub(range.start).map(|at| at / pool);
    let row = cx.selection.token.and_then(row_of).filter(|row| *row < grid.rows);
    let spec = Spec {
        name: &format!("similarity of tokens, layer {}", shown.origin.layer),
        row_axis: &axis,
        column_axis: &axis,
        unit: &format!("cosine{}{}", if pool == 1 { "" } else { ", mean over pairs of tokens" }, beyond),
        scale: Scale::Diverging,
        row,
        column: row,
        column_groups: 0,
        tooltip: &tooltip,
        height,
    };
    if let Some((chosen_row, chosen_column)) = heat.show(ui, grid, &spec).chosen {
        // The cell's other token: with the selection on the diagonal, either direction leads away from it.
        let chosen = if Some(chosen_row) == row { chosen_column } else { chosen_row };
        if Some(chosen) != row {
            cx.selection.token = Some((range.start + chosen * pool) as u32);
        }
    }
}

fn neighbours(ui: &mut Ui, cx: &mut Cx<'_>, shown: &Shown<'_>, listing: &mut Latest<(Origin, u32), Vec<(usize, f32)>>) {
    let Some(token) = cx.selection.token.filter(|token| shown.rows.row(*token as usize).is_some()) else {
        ui.weak("Select a token to list those most like it.");
        *listing = Latest::default(); // nobody waits for it any more
        return;
    };
    ui.strong(format!("Most like {}", shown.token(cx.subject, token as usize)));
    let rows = shown.rows.clone();
    let make = move || nearest(&rows, token as usize);
    let Some(found) = listing.get(ui.ctx(), &(shown.origin, token), make) else {
        ui.spinner();
        return;
    };
    egui::ScrollArea::vertical().auto_shrink([false, false]).show(ui, |ui| {
        for (at, cosine) in found {
            let text = format!("{}  {}", number((cosine * 1000.0).round() / 1000.0), shown.token(cx.subject, *at));
            if ui.selectable_label(false, text).on_hover_text("Click to select this token.").clicked() {
                cx.selection.token = Some(*at as u32);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_holds_the_selection_and_stays_in_the_text() {
        assert_eq!(window(Part::Around, 300, Some(299)), (0..300, 1));
        assert_eq!(window(Part::Whole, 1025, None), (0..1025, 3));
        for token in (0..5000).step_by(37).chain([4999]) {
            let (range, pool) = window(Part::Around, 5000, Some(token));
            assert!(
                range.contains(&(token as usize)) && range.len() == MOST && pool == 1 && range.end <= 5000,
                "{token}"
            );
        }
    }
}
