//! One expert of one layer: who uses it, how much, and with which others.

use egui::text::LayoutJob;
use egui::{Align, Color32, FontId, Layout, RichText, ScrollArea, Ui, vec2};
use egui_extras::{Column, TableBuilder};
use egui_plot::{Bar, BarChart, Plot};

use crate::analysis::expert::{BINS, Report};
use crate::analysis::routing::{keys, step};
use crate::heat::number;
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::store::Sequence;
use crate::view::{Cx, View};
use crate::views::{choose, pieces};

/// Tokens in the table of uses.
const USES: usize = 500;
/// Tokens before and behind a use that are shown.
const CONTEXT: (u32, u32) = (12, 8);
/// Rows of the table of companions.
const PAIRS: usize = 64;
const ROW: f32 = 20.0;

/// Layer, expert, and how far each text had come.
type ReportKey = (u32, u32, Vec<(u32, (u64, bool))>);

/// One expert of one layer.
#[derive(Default)]
pub struct ExpertPage {
    report: Latest<ReportKey, Report>,
}

impl View for ExpertPage {
    fn name(&self) -> &'static str {
        "expert"
    }

    fn about(&self) -> &'static str {
        "One expert: the tokens that use it most, in their context, which texts it works for, and with which others."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        if cx.subject.model.experts == 0 || cx.moe_layers().is_empty() {
            ui.weak("This model has no layers with experts.");
            return;
        }
        let mut layer = None;
        ui.horizontal_wrapped(|ui| {
            layer = choose::layer(ui, cx);
            choose::expert(ui, cx);
        });
        let Some(layer) = layer else { return };
        let has_routing = |sequence: &Sequence| keys(layer).iter().all(|key| sequence.column(*key).is_some());
        if !cx.store.sequences().iter().any(has_routing) {
            let has_tokens = cx.store.sequences().iter().any(|sequence| !sequence.tokens.is_empty());
            if has_tokens {
                let warning = format!("No routing was recorded in layer {layer}: record with --taps routing.");
                ui.colored_label(ui.visuals().warn_fg_color, warning);
            } else {
                ui.weak("No text yet. When one is read or written, this page tells what an expert does in it.");
            }
            return;
        }
        let chosen = cx.selection.expert.filter(|expert| *expert < cx.subject.model.experts);
        let Some(expert) = chosen else {
            suggest(ui, cx, layer);
            return;
        };
        let key: ReportKey = (layer, expert, cx.store.sequences().iter().map(|s| (s.info.number, step(s))).collect());
        if self.report.lacks(&key) {
            let texts: Vec<Sequence> = cx.store.sequences().iter().map(|s| s.with_only(&keys(layer))).collect();
            let experts = cx.subject.model.experts as usize;
            self.report.get(ui.ctx(), &key, move || Report::read(&texts, layer, expert, experts, USES));
        }
        let made = self.report.value().filter(|((of, number, _), _)| (*of, *number) == (layer, expert));
        let Some((_, report)) = made else {
            ui.spinner();
            return;
        };
        summary(ui, cx, layer, expert, report);
        if report.chosen == 0 {
            ui.weak(format!("None of the {} tokens whose routing is held chose it.", report.tokens));
            return;
        }
        ui.add_space(4.0);
        let room = ui.available_size();
        let right = (room.x * 0.38).clamp(220.0, 420.0);
        ui.horizontal_top(|ui| {
            let left = vec2(room.x - right - 16.0, room.y);
            ui.allocate_ui_with_layout(left, Layout::top_down(Align::Min), |ui| uses(ui, cx, report));
            ui.separator();
            ui.allocate_ui_with_layout(vec2(right - 4.0, room.y), Layout::top_down(Align::Min), |ui| {
                ScrollArea::vertical().id_salt("facts").auto_shrink(false).show(ui, |ui| {
                    shares(ui, cx, report);
                    histogram(ui, report);
                    pairs(ui, cx, report);
                });
            });
        });
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let (Some(layer), Some(expert)) = (choose::moe_layer(cx), cx.selection.expert) else { return Vec::new() };
        let experts = cx.subject.model.experts as usize;
        let report = Report::read(cx.store.sequences(), layer, expert, experts, usize::MAX);
        let name = |what: &str| format!("expert.{layer}.{expert}.{what}");
        let (uses, texts, pairs) = (&report.uses, &report.shares, &report.pairs);
        let integers = |what: &str, axis, cells: Vec<i64>| Table::integers(name(what), &[(axis, cells.len())], cells);
        let floats = |what: &str, axis, cells: Vec<f32>| Table::floats(name(what), &[(axis, cells.len())], cells);
        let word = |used: &crate::analysis::expert::Use| {
            let token = cx.store.sequence(used.sequence).and_then(|s| s.tokens.get(used.position as usize));
            token.map_or_else(String::new, |token| pieces::word(cx.subject, token.id))
        };
        let text = |number: u32| cx.store.sequence(number).map_or_else(String::new, |s| s.info.name.clone());
        let count = |number: u64| number as i64;
        vec![
            Table::words(name("uses.token"), "use", uses.iter().map(word).collect()),
            integers("uses.text", "use", uses.iter().map(|used| i64::from(used.sequence)).collect()),
            integers("uses.position", "use", uses.iter().map(|used| i64::from(used.position)).collect()),
            floats("uses.weight", "use", uses.iter().map(|used| used.weight).collect()),
            integers("uses.rank", "use", uses.iter().map(|used| i64::from(used.rank)).collect()),
            Table::words(name("texts.name"), "text", texts.iter().map(|share| text(share.sequence)).collect()),
            integers("texts.tokens", "text", texts.iter().map(|share| count(share.tokens)).collect()),
            integers("texts.chosen", "text", texts.iter().map(|share| count(share.chosen)).collect()),
            floats(
                "texts.lift",
                "text",
                texts.iter().map(|share| report.lift(share).map_or(f32::NAN, |lift| lift as f32)).collect(),
            ),
            integers("weights.bins", "bin", report.bins.iter().map(|bin| count(*bin)).collect()),
            floats("weights.largest", "number", vec![report.most]),
            integers("pairs.expert", "pair", pairs.iter().map(|pair| i64::from(pair.expert)).collect()),
            integers("pairs.both", "pair", pairs.iter().map(|pair| count(pair.both)).collect()),
            floats("pairs.lift", "pair", pairs.iter().map(|pair| report.pair_lift(pair) as f32).collect()),
        ]
    }

    fn is_busy(&self) -> bool {
        self.report.is_busy()
    }
}

/// The busiest experts, when none is selected.
fn suggest(ui: &mut Ui, cx: &mut Cx<'_>, layer: u32) {
    ui.weak("Choose an expert: type its number above, or click it in the routing view.");
    let Some(load) = cx.store.load(layer) else { return };
    let mut busiest: Vec<(u64, u32)> = load.tokens.iter().copied().zip(0..).collect();
    busiest.sort_by_key(|&(tokens, expert)| (std::cmp::Reverse(tokens), expert));
    ui.horizontal_wrapped(|ui| {
        ui.label(format!("The busiest of layer {layer}:"));
        for (tokens, expert) in busiest.into_iter().take(8) {
            let button = ui.button(format!("expert {expert}")).on_hover_text(format!("{tokens} tokens chose it"));
            if button.clicked() {
                cx.selection.layer = layer;
                cx.selection.expert = Some(expert);
            }
        }
    });
}

fn summary(ui: &mut Ui, cx: &Cx<'_>, layer: u32, expert: u32, report: &Report) {
    let model = &cx.subject.model;
    ui.horizontal_wrapped(|ui| {
        ui.strong(format!("{layer}:{expert}"));
        if model.n_group > 1 {
            ui.weak(format!("group {}", expert / cx.subject.experts_per_group().max(1)));
        }
        let share = report.chosen as f64 / (report.tokens as f64).max(1.0);
        let even = f64::from(model.num_experts_per_tok) / f64::from(model.experts);
        ui.label(format!("chosen for {} of {} tokens ({:.1} %)", report.chosen, report.tokens, 100.0 * share));
        ui.weak(format!("{:.2}× an even share", share / even)).on_hover_text(
            "1× is what each expert would get if the router treated all alike. Counted over the rows that are held.",
        );
        if report.chosen > 0 {
            let chosen = report.chosen as f64;
            ui.label(format!("mean weight {}", number((report.weight / chosen) as f32)))
                .on_hover_text("The weight says how much of an expert's answer a token takes.");
            ui.label(format!("first choice in {:.0} %", 100.0 * report.first as f64 / chosen));
        }
        if let Some(bias) = cx.subject.expert_bias.get(&layer).and_then(|bias| bias.get(expert as usize)) {
            ui.label(format!("bias {}", number(*bias))).on_hover_text(
                "Correction bias: added to the expert's score when experts are chosen, not to its weight. It was \
                 learned to keep the load even.",
            );
        }
    });
}

/// The tokens with the largest weights, each in its context.
fn uses(ui: &mut Ui, cx: &mut Cx<'_>, report: &Report) {
    let more = if report.chosen as usize > report.uses.len() {
        format!(" (the first {} of {})", report.uses.len(), report.chosen)
    } else {
        String::new()
    };
    ui.label(RichText::new(format!("tokens that use it most{more}")).strong());
    let width = ui.available_width();
    let token_width = 64.0;
    let side = ((width - token_width - 60.0 - 110.0) / 2.0).max(60.0);
    TableBuilder::new(ui)
        .id_salt("uses")
        .striped(true)
        .auto_shrink(false)
        .cell_layout(Layout::left_to_right(Align::Center))
        .column(Column::exact(52.0))
        .column(Column::exact(90.0).clip(true))
        .column(Column::exact(side).clip(true))
        .column(Column::exact(token_width).clip(true))
        .column(Column::remainder().clip(true))
        .header(ROW, |mut header| {
            for title in ["weight", "text : position", "", "token", ""] {
                header.col(|ui| {
                    if title == "token" {
                        let middle = Layout::centered_and_justified(egui::Direction::LeftToRight);
                        ui.with_layout(middle, |ui| ui.weak(title));
                    } else {
                        ui.weak(title);
                    }
                });
            }
        })
        .body(|body| {
            body.rows(ROW, report.uses.len(), |mut row| {
                let used = report.uses[row.index()];
                let Some(sequence) = cx.store.sequence(used.sequence) else { return };
                let Some(token) = sequence.tokens.get(used.position as usize) else { return };
                let is_selected = cx.selection.sequence == used.sequence && cx.selection.token == Some(used.position);
                row.set_selected(is_selected);
                row.col(|ui| {
                    ui.label(number(used.weight));
                });
                row.col(|ui| {
                    ui.weak(format!("{} : {}", choose::shorten(&sequence.info.name, 9), used.position));
                });
                let (first, end) = (used.position.saturating_sub(CONTEXT.0), used.position + 1 + CONTEXT.1);
                row.col(|ui| {
                    ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
                        ui.add(egui::Label::new(words(ui, cx, sequence, first..used.position)).extend());
                    });
                });
                row.col(|ui| {
                    let word = pieces::word(cx.subject, token.id);
                    let name = &sequence.info.name;
                    let label = format!("{word}, token {} of {name}, weight {}", used.position, number(used.weight));
                    ui.with_layout(Layout::centered_and_justified(egui::Direction::LeftToRight), |ui| {
                        let button = ui.button(word).on_hover_text("Go to this token in all views.");
                        button.widget_info(|| egui::WidgetInfo::labeled(egui::Role::Button, true, &label));
                        if button.clicked() {
                            choose::select(cx, sequence, used.position as usize);
                        }
                    });
                });
                row.col(|ui| {
                    ui.add(egui::Label::new(words(ui, cx, sequence, used.position + 1..end)).extend());
                });
            });
        });
}

fn words(ui: &Ui, cx: &Cx<'_>, sequence: &Sequence, range: std::ops::Range<u32>) -> LayoutJob {
    let mut job = LayoutJob::default();
    for token in sequence.tokens.iter().take(range.end as usize).skip(range.start as usize) {
        pieces::append(&mut job, cx.subject, token.id, &FontId::proportional(12.5), ui.visuals().text_color());
    }
    job
}

/// What each text gives to the expert, against what it gives to all.
fn shares(ui: &mut Ui, cx: &mut Cx<'_>, report: &Report) {
    ui.label(RichText::new("by text").strong()).on_hover_text(
        "Lift: how much more often than the average text this one chooses the expert. 1× is the average, 2× twice as \
         often.",
    );
    egui::Grid::new("shares").num_columns(4).striped(true).show(ui, |ui| {
        for title in ["text", "tokens", "share", "lift"] {
            ui.weak(title);
        }
        ui.end_row();
        for share in &report.shares {
            let Some(sequence) = cx.store.sequence(share.sequence) else { continue };
            let is_shown = cx.selection.sequence == share.sequence;
            if ui.selectable_label(is_shown, choose::shorten(&sequence.info.name, 18)).clicked() && !is_shown {
                cx.selection.sequence = share.sequence;
                cx.selection.token = None;
            }
            ui.label(share.chosen.to_string());
            bar(ui, share.chosen as f32 / report.chosen.max(1) as f32);
            ui.label(report.lift(share).map_or_else(|| "–".into(), |lift| format!("{lift:.2}×")));
            ui.end_row();
        }
    });
    ui.add_space(6.0);
}

fn bar(ui: &mut Ui, share: f32) {
    let (place, _) = ui.allocate_exact_size(vec2(90.0, 14.0), egui::Sense::hover());
    let painter = ui.painter();
    painter.rect_filled(place, 2.0, ui.visuals().extreme_bg_color);
    let filled = egui::Rect::from_min_size(place.min, vec2(place.width() * share.clamp(0.0, 1.0), place.height()));
    painter.rect_filled(filled, 2.0, bar_colour(ui));
    let text = format!("{:.0} %", 100.0 * share);
    let font = FontId::proportional(10.0);
    painter.text(
        place.right_center() - vec2(3.0, 0.0),
        egui::Align2::RIGHT_CENTER,
        text,
        font,
        ui.visuals().text_color(),
    );
}

fn bar_colour(ui: &Ui) -> Color32 {
    ui.visuals().panel_fill.lerp_to_gamma(crate::colour::kind(0), if ui.visuals().dark_mode { 0.8 } else { 0.6 })
}

fn histogram(ui: &mut Ui, report: &Report) {
    ui.label(RichText::new("its weights").strong());
    let step = f64::from(report.most) / BINS as f64;
    let colour = bar_colour(ui);
    let bars = report.bins.iter().enumerate().map(|(i, count)| {
        let from = i as f64 * step;
        let name = format!("{} to {}", number(from as f32), number((from + step) as f32));
        Bar::new(from + step / 2.0, *count as f64).width(step * 0.9).name(name).fill(colour)
    });
    let chart = BarChart::new("tokens", bars.collect()).color(colour);
    Plot::new("weights")
        .height(120.0)
        .allow_drag(false)
        .allow_zoom(false)
        .allow_scroll(false)
        .allow_boxed_zoom(false)
        .include_x(0.0)
        .include_y(0.0)
        .x_axis_label("weight")
        .y_axis_label("tokens")
        .show(ui, |plot| plot.bar_chart(chart));
    ui.add_space(6.0);
}

fn pairs(ui: &mut Ui, cx: &mut Cx<'_>, report: &Report) {
    let most = report.pairs.len().min(PAIRS);
    ui.label(RichText::new("chosen together with").strong()).on_hover_text(
        "Lift: how much more often two experts are chosen for the same token than if each were chosen on its own. 1× \
         means that they have nothing to do with each other.",
    );
    egui::Grid::new("pairs").num_columns(4).striped(true).show(ui, |ui| {
        for title in ["expert", "tokens", "share", "lift"] {
            ui.weak(title);
        }
        ui.end_row();
        for pair in &report.pairs[..most] {
            if ui.link(format!("expert {}", pair.expert)).clicked() {
                cx.selection.expert = Some(pair.expert);
            }
            ui.label(pair.both.to_string());
            bar(ui, pair.both as f32 / report.chosen.max(1) as f32);
            ui.label(format!("{:.2}×", report.pair_lift(pair)));
            ui.end_row();
        }
    });
    if report.pairs.len() > most {
        ui.weak(format!("and {} others, less often", report.pairs.len() - most));
    }
}
