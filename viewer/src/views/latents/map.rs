//! Every number of every token.

use egui::Ui;

use crate::analysis::latents::{pooled, size_quantile};
use crate::heat::{Grid, HeatMap, Scale, Spec, number};
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::view::Cx;

use super::{Origin, Rows, Shown, say_missing};

/// Rows of the map at most; longer texts share rows.
const MOST_ROWS: usize = 4096;
/// The share of the numbers that the scale's ends enclose: a few outliers must not make all others look like 0.
const ENCLOSED: f64 = 0.98;

struct Made {
    grid: Grid,
    pool: usize,
    missing: usize,
    /// Whether some numbers are beyond the scale's ends.
    clipped: bool,
}

#[derive(Default)]
pub(super) struct Map {
    made: Latest<Origin, Made>,
    heat: HeatMap,
    dimension: Option<usize>,
}

fn make(rows: &Rows) -> Made {
    let pool = rows.tokens.div_ceil(MOST_ROWS).max(1);
    let cells = pooled(rows.tokens, rows.dim(), pool, |at| rows.row(at));
    let end = size_quantile(&cells, ENCLOSED);
    let mut grid = Grid::around_zero(rows.tokens.div_ceil(pool), rows.dim(), cells);
    let most = grid.range.1;
    let end = end.filter(|end| *end > 0.0).unwrap_or(most);
    grid.range = (-end, end);
    Made { grid, pool, missing: rows.missing(), clipped: end < most }
}

impl Map {
    pub(super) fn show(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, shown: &Shown<'_>) {
        let rows = shown.rows.clone();
        let Some(made) = self.made.get(ui.ctx(), &shown.origin, move || make(&rows)) else {
            ui.spinner();
            return;
        };
        let Made { grid, pool, .. } = made;
        let pool = *pool;
        ui.horizontal_wrapped(|ui| {
            if let (Some(token), Some(dimension)) = (cx.selection.token, self.dimension) {
                let value = shown.rows.row(token as usize).and_then(|row| row.get(dimension));
                let value = value.map_or("no row".to_owned(), |value| number(*value));
                ui.label(format!("token {}, dimension {dimension}: {value}", shown.token(cx.subject, token as usize)));
            } else {
                ui.weak("Click a cell for its token and number.");
            }
            if pool > 1 {
                ui.weak(format!("Each row is {pool} tokens: the number furthest from 0."));
            }
            say_missing(ui, made.missing, shown.rows.tokens);
        });
        let name = shown.origin.cached.name();
        let tooltip = |row: usize, dimension: usize| {
            let value = grid.get(row, dimension).filter(|value| !value.is_nan());
            let value = value.map_or("no row".to_owned(), number);
            if pool == 1 {
                format!("token {}, dimension {dimension}: {value}", shown.token(cx.subject, row))
            } else {
                let (first, last) = (row * pool, ((row + 1) * pool).min(shown.rows.tokens) - 1);
                format!("tokens {first} to {last}, dimension {dimension}: {value}, the furthest from 0")
            }
        };
        let clipped = if made.clipped { "value (the strongest 2 % look like the ends)" } else { "value" };
        let spec = Spec {
            name: &format!("{name} by token and dimension, layer {}", shown.origin.layer),
            row_axis: "token",
            column_axis: "dimension",
            unit: clipped,
            scale: Scale::Diverging,
            row: cx.selection.token.map(|token| token as usize / pool),
            column: self.dimension,
            column_groups: 0,
            tooltip: &tooltip,
            height: (ui.available_height() - 60.0).max(80.0),
        };
        if let Some((row, dimension)) = self.heat.show(ui, grid, &spec).chosen {
            // A shared row keeps the token that is selected in it.
            if cx.selection.token.is_none_or(|token| token as usize / pool != row) {
                cx.selection.token = Some((row * pool) as u32);
            }
            self.dimension = Some(dimension);
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.made.is_busy()
    }
}

/// All numbers, NaN where a row is missing.
pub(super) fn tables(name: &str, rows: &Rows) -> Vec<Table> {
    let cells = pooled(rows.tokens, rows.dim(), 1, |at| rows.row(at));
    vec![Table::floats(name, &[("token", rows.tokens), ("dimension", rows.dim())], cells)]
}
