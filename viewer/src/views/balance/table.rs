//! The measures of all layers, to sort.

use egui::Ui;
use egui_extras::{Column, TableBuilder};

use crate::analysis::balance::unused_by_chance;
use crate::heat::number;
use crate::view::Cx;

use super::report::{Layer, Measure, Report};
use super::{BALANCEDNESS, DEAD, ENTROPY, GINI, HOT_EXPERTS, TOP_TENTH};

/// Which column the rows are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Order {
    column: usize,
    falling: bool,
}

/// A column: its name, what it means, and the number that it sorts by.
struct Measured {
    name: &'static str,
    about: &'static str,
    value: fn(&Layer) -> f64,
}

fn of(layer: &Layer, number: fn(&crate::analysis::balance::Balance) -> f64) -> f64 {
    layer.balance.as_ref().map_or(f64::NAN, number)
}

const COLUMNS: [Measured; 9] = [
    Measured { name: "layer", about: "Number of the layer. Click one to select it.", value: |l| f64::from(l.number) },
    Measured { name: "balancedness", about: BALANCEDNESS, value: |l| of(l, |b| b.balancedness) },
    Measured { name: "entropy, bits", about: ENTROPY, value: |l| of(l, |b| b.entropy_bits) },
    Measured { name: "of most", about: ENTROPY, value: |l| of(l, |b| b.entropy_share) },
    Measured { name: "busiest tenth", about: TOP_TENTH, value: |l| of(l, |b| b.top_share) },
    Measured { name: "Gini", about: GINI, value: |l| of(l, |b| b.gini) },
    Measured { name: "hot", about: HOT_EXPERTS, value: |l| of(l, |b| b.hot.len() as f64) },
    Measured { name: "never used", about: DEAD, value: |l| of(l, |b| b.dead.len() as f64) },
    Measured {
        name: "hottest",
        about: "The expert with the most load, and how many times its fair share it got. Click one to select it.",
        value: |l| of(l, |b| 1.0 / b.balancedness),
    },
];

/// Draws the table. A click on a layer selects it, a click on its hottest expert selects that.
pub(super) fn show(ui: &mut Ui, cx: &mut Cx<'_>, report: &Report, measure: Measure, order: &mut Order) {
    let mut layers: Vec<&Layer> = report.layers.iter().collect();
    let value = COLUMNS[order.column].value;
    layers.sort_by(|a, b| value(a).total_cmp(&value(b)).then(a.number.cmp(&b.number)));
    if order.falling {
        layers.reverse();
    }
    let seen = layers.first().map_or(0, |layer| layer.seen(cx.subject.model.num_experts_per_tok));
    let (experts, top_k) = (cx.subject.model.experts as usize, cx.subject.model.num_experts_per_tok as usize);
    let chance = unused_by_chance(experts, top_k, seen as f64);
    let dead = format!("{DEAD} An even router would have left {} unused by chance so far.", number(chance as f32));
    let table = TableBuilder::new(ui)
        .striped(true)
        .sense(egui::Sense::click())
        .cell_layout(egui::Layout::left_to_right(egui::Align::Center))
        .columns(Column::auto().at_least(78.0), COLUMNS.len() - 1)
        .column(Column::remainder().at_least(110.0));
    let header = table.header(22.0, |mut header| {
        for (column, measured) in COLUMNS.iter().enumerate() {
            header.col(|ui| {
                let order_name = match (order.column == column, order.falling) {
                    (true, true) => " (falling)",
                    (true, false) => " (rising)",
                    _ => "",
                };
                let about = if measured.about == DEAD { &dead } else { measured.about };
                let button = egui::Button::new(egui::RichText::new(format!("{}{order_name}", measured.name)).strong());
                let response = ui.add(button.frame(false));
                if response.on_hover_text(format!("{about}\nClick to sort ({}).", measure.unit())).clicked() {
                    let falling = if order.column == column { !order.falling } else { column > 0 };
                    *order = Order { column, falling };
                }
            });
        }
    });
    header.body(|body| {
        body.rows(20.0, layers.len(), |mut row| {
            let layer = layers[row.index()];
            row.set_selected(layer.number == cx.selection.layer);
            for column in 0..COLUMNS.len() {
                row.col(|ui| cell(ui, cx, layer, column));
            }
            if row.response().clicked() {
                cx.selection.layer = layer.number;
            }
        });
    });
}

fn cell(ui: &mut Ui, cx: &mut Cx<'_>, layer: &Layer, column: usize) {
    let measured = &COLUMNS[column];
    let value = (measured.value)(layer);
    match (measured.name, &layer.balance) {
        ("layer", _) => {
            let selected = layer.number == cx.selection.layer;
            if ui.selectable_label(selected, format!("{}", layer.number)).clicked() {
                cx.selection.layer = layer.number;
            }
        }
        (_, None) => {
            ui.weak("no load");
        }
        ("hottest", Some(balance)) => {
            let selected = layer.number == cx.selection.layer && cx.selection.expert == Some(balance.hottest);
            let text = format!("{}, {value:.1} × mean", balance.hottest);
            if ui.selectable_label(selected, text).clicked() {
                (cx.selection.layer, cx.selection.expert) = (layer.number, Some(balance.hottest));
            }
        }
        ("of most" | "busiest tenth", _) => {
            ui.label(format!("{:.0} %", 100.0 * value));
        }
        ("hot" | "never used", _) => {
            ui.label(format!("{value:.0}"));
        }
        _ => {
            ui.label(format!("{value:.2}"));
        }
    }
}
