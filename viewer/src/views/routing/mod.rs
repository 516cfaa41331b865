//! Which tokens go to which experts: along the text, along the layers, and as a lattice that lights up.

mod lattice;
mod texts;

use egui::Ui;
use moewe_plan::TapGroup;

use crate::analysis::routing::{Sums, by_layer, by_token, keys, step, window};
use crate::heat::{Grid, HeatMap, Scale, Spec, number};
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::store::Sequence;
use crate::view::{Cx, View};
use crate::views::{choose, pieces};

/// Tokens of a map at most; longer texts are shown in parts.
const ROWS: usize = 8192;
/// Height that a map leaves for its legend and axes.
const AROUND: f32 = 74.0;

/// What is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Lattice,
    Tokens,
    Layers,
    Texts,
}

/// What the map of layers tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Of {
    #[default]
    Token,
    Share,
    Weight,
}

/// Text, layer, first token of the map, how far the text had come.
type TokensKey = (u32, u32, usize, (u64, bool));
/// Text, and how far it had come.
type LayersKey = (u32, (u64, bool));

struct LayerMaps {
    sums: Sums,
    share: Grid,
    weight: Grid,
}

/// Which tokens go to which experts.
#[derive(Default)]
pub struct Routing {
    mode: Mode,
    of: Of,
    lattice: lattice::Lattice,
    texts: texts::Texts,
    tokens: Latest<TokensKey, Grid>,
    tokens_map: HeatMap,
    layers: Latest<LayersKey, LayerMaps>,
    layers_map: HeatMap,
    /// The map of layers for a token: text, token, version of the store.
    at_token: Option<((u32, usize, u64), Grid)>,
}

impl View for Routing {
    fn name(&self) -> &'static str {
        "routing"
    }

    fn about(&self) -> &'static str {
        "Which experts the router of each layer chose for each token, and with which weights."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        let Some(sequence) = choose::sequence(cx) else {
            ui.weak("No text yet. When one is read or written, its tokens light up their experts here.");
            return;
        };
        let Some(shown) = choose::moe_layer(cx) else {
            ui.weak("This model has no layers with experts.");
            return;
        };
        let mut layer = shown;
        ui.horizontal_wrapped(|ui| {
            for (mode, name, hint) in [
                (Mode::Lattice, "lattice", "The experts of a layer as squares that light up for a token."),
                (Mode::Tokens, "tokens × experts", "A row for each token of the text, a column for each expert."),
                (Mode::Layers, "layers × experts", "A row for each layer: one token's way, or the whole text's."),
                (Mode::Texts, "texts × experts", "A row for each text: which experts of a layer its tokens are given."),
            ] {
                ui.selectable_value(&mut self.mode, mode, name).on_hover_text(hint);
            }
            ui.separator();
            if self.mode != Mode::Texts {
                choose::text(ui, cx);
            }
            if self.mode != Mode::Layers {
                layer = choose::layer(ui, cx).unwrap_or(shown);
            }
        });
        let has_any = |layer: u32| keys(layer).iter().all(|key| sequence.column(*key).is_some());
        if !sequence.tokens.is_empty() && !cx.moe_layers().iter().any(|layer| has_any(*layer)) {
            let warning = "No routing was recorded: record with --taps routing.";
            ui.colored_label(ui.visuals().warn_fg_color, warning);
            return;
        }
        match self.mode {
            Mode::Lattice => self.lattice.ui(ui, cx, sequence, layer),
            Mode::Tokens => self.tokens(ui, cx, sequence, layer),
            Mode::Layers => self.layers(ui, cx, sequence),
            Mode::Texts => self.texts.ui(ui, cx, layer),
        }
    }

    fn parts(&self) -> &'static [&'static str] {
        &["lattice", "tokens", "layers", "texts"]
    }

    fn show_part(&mut self, part: usize) {
        self.mode = [Mode::Lattice, Mode::Tokens, Mode::Layers, Mode::Texts].get(part).copied().unwrap_or_default();
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let (Some(sequence), Some(layer)) = (choose::sequence(cx), choose::moe_layer(cx)) else { return Vec::new() };
        let model = &cx.subject.model;
        let (layers, experts) = (model.layers as usize, model.experts as usize);
        let axes =
            |first| [(first, if first == "token" { sequence.tokens.len() } else { layers }), ("expert", experts)];
        let sums = Sums::of(sequence, model.layers, experts);
        let of_layer = by_token(sequence, layer, experts, 0..sequence.tokens.len());
        let counts = sums.tokens.iter().map(|tokens| i64::from(*tokens)).collect();
        let mut tables = vec![
            Table::floats(format!("routing.layer{layer}.weights"), &axes("token"), of_layer),
            Table::floats("routing.share_percent", &axes("layer"), sums.percent(experts)),
            Table::floats("routing.weight_sums", &axes("layer"), sums.weights),
            Table::integers("routing.tokens", &[("layer", layers)], counts),
        ];
        if let Some(token) = choose::token(cx, sequence) {
            let cells = by_layer(sequence, model.layers, experts, token);
            tables.push(Table::floats(format!("routing.token{token}.weights"), &axes("layer"), cells));
        }
        if let Some(bias) = cx.subject.expert_bias.get(&layer) {
            let name = format!("routing.layer{layer}.correction_bias");
            tables.push(Table::floats(name, &[("expert", bias.len())], bias.clone()));
        }
        tables
    }

    fn is_busy(&self) -> bool {
        self.tokens.is_busy() || self.layers.is_busy() || self.texts.is_busy()
    }
}

impl Routing {
    fn tokens(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, sequence: &Sequence, layer: u32) {
        let experts = cx.subject.model.experts as usize;
        let selected = choose::token(cx, sequence);
        let range = window(sequence.tokens.len(), selected, ROWS);
        let key = (sequence.info.number, layer, range.start, step(sequence));
        if self.tokens.lacks(&key) {
            let (rows, range) = (sequence.with_only(&keys(layer)), range.clone());
            let make = move || Grid::from_zero(range.len(), experts, by_token(&rows, layer, experts, range));
            self.tokens.get(ui.ctx(), &key, make);
        }
        let made = self.tokens.value().filter(|(of, _)| (of.0, of.1) == (key.0, key.1));
        let Some((&(_, _, first, _), grid)) = made else {
            busy(ui, self.tokens.is_busy());
            return;
        };
        if sequence.tokens.len() > grid.rows {
            let (end, all) = (first + grid.rows, sequence.tokens.len());
            ui.weak(format!("tokens {first} to {} of {all}: select another to see its part", end.saturating_sub(1)));
        }
        let known = |row: usize| sequence.routing(layer, first + row).is_some();
        let tooltip = |row: usize, expert: usize| {
            let word = sequence.tokens.get(first + row).map(|token| pieces::word(cx.subject, token.id));
            let weight = match grid.get(row, expert) {
                Some(weight) if weight.is_nan() => "its routing is not held (dropped, or let go to save memory)".into(),
                Some(0.0) if known(row) => "not chosen".into(),
                Some(weight) => format!("weight {}: how much of this expert's answer the token takes", number(weight)),
                None => String::new(),
            };
            format!("token {}: {}\nlayer {layer}, expert {expert}\n{weight}", first + row, word.unwrap_or_default())
        };
        let axis = if first > 0 { format!("token − {first}") } else { "token".into() };
        let answer = self.tokens_map.show(
            ui,
            grid,
            &Spec {
                name: &format!("experts by token, layer {layer}"),
                row_axis: &axis,
                column_axis: "expert",
                unit: "weight",
                scale: Scale::Sequential(cx.palette),
                row: selected.and_then(|token| token.checked_sub(first)).filter(|row| *row < grid.rows),
                column: cx.selection.expert.map(|expert| expert as usize).filter(|expert| *expert < experts),
                column_groups: groups(cx),
                tooltip: &tooltip,
                height: (ui.available_height() - AROUND).max(60.0),
            },
        );
        if let Some((row, expert)) = answer.chosen {
            choose::select(cx, sequence, first + row);
            cx.selection.expert = Some(expert as u32);
        }
    }

    fn layers(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, sequence: &Sequence) {
        ui.horizontal_wrapped(|ui| {
            for (of, name, hint) in [
                (Of::Token, "this token", "The weights that the selected (else the newest) token gave in each layer."),
                (Of::Share, "share of tokens", "How many of all tokens of the text chose an expert, in percent."),
                (Of::Weight, "sum of weights", "The weights of all tokens of the text, added up."),
            ] {
                ui.selectable_value(&mut self.of, of, name).on_hover_text(hint);
            }
        });
        let (layers, experts) = (cx.subject.model.layers, cx.subject.model.experts as usize);
        let token = choose::token(cx, sequence).unwrap_or(sequence.tokens.len().saturating_sub(1));
        let grid = if self.of == Of::Token {
            let key = (sequence.info.number, token, cx.store.version());
            if self.at_token.as_ref().is_none_or(|(of, _)| *of != key) {
                let cells = by_layer(sequence, layers, experts, token);
                self.at_token = Some((key, Grid::from_zero(layers as usize, experts, cells)));
            }
            self.at_token.as_ref().map(|(_, grid)| grid)
        } else {
            let key = (sequence.info.number, step(sequence));
            if self.layers.lacks(&key) {
                let all: Vec<_> = cx.moe_layers().iter().flat_map(|layer| keys(*layer)).collect();
                let rows = sequence.with_only(&all);
                self.layers.get(ui.ctx(), &key, move || {
                    let sums = Sums::of(&rows, layers, experts);
                    let grid = |cells| Grid::from_zero(layers as usize, experts, cells);
                    LayerMaps { share: grid(sums.percent(experts)), weight: grid(sums.weights.clone()), sums }
                });
            }
            let made = self.layers.value().filter(|((of, _), _)| *of == key.0);
            made.map(|(_, maps)| if self.of == Of::Share { &maps.share } else { &maps.weight })
        };
        let Some(grid) = grid else {
            busy(ui, self.layers.is_busy());
            return;
        };
        let (of, sums) = (self.of, self.layers.value().map(|(_, maps)| &maps.sums));
        let word = sequence.tokens.get(token).map(|token| pieces::word(cx.subject, token.id)).unwrap_or_default();
        let title = match of {
            Of::Token => format!("token {token}: {word}"),
            _ => format!("all tokens of {}", choose::shorten(&sequence.info.name, 40)),
        };
        ui.weak(title);
        let unit = match of {
            Of::Token => "weight",
            Of::Share => "% of tokens",
            Of::Weight => "summed weights",
        };
        let tooltip = |layer: usize, expert: usize| {
            let value = grid.get(layer, expert).unwrap_or(f32::NAN);
            let dense = !cx.subject.model.moe_layers.contains(&(layer as u32));
            let seen = || sums.and_then(|sums| sums.tokens.get(layer)).copied().unwrap_or(0);
            let what = match of {
                _ if value.is_nan() && dense => "this layer is dense: it has no experts".into(),
                _ if value.is_nan() => "its routing is not held".into(),
                Of::Token if value == 0.0 => "not chosen".into(),
                Of::Token => format!("weight {}: how much of this expert's answer the token takes", number(value)),
                Of::Share => format!("chosen for {} % of {} tokens", number(value), seen()),
                Of::Weight => format!("weights of {} tokens sum to {}", seen(), number(value)),
            };
            format!("layer {layer}, expert {expert}\n{what}")
        };
        let answer = self.layers_map.show(
            ui,
            grid,
            &Spec {
                name: "experts by layer",
                row_axis: "layer",
                column_axis: "expert",
                unit,
                scale: Scale::Sequential(cx.palette),
                row: Some(cx.selection.layer as usize).filter(|layer| *layer < grid.rows),
                column: cx.selection.expert.map(|expert| expert as usize).filter(|expert| *expert < experts),
                column_groups: groups(cx),
                tooltip: &tooltip,
                height: (ui.available_height() - AROUND).max(60.0),
            },
        );
        if let Some((layer, expert)) = answer.chosen {
            cx.selection.layer = layer as u32;
            cx.selection.expert = Some(expert as u32);
        }
    }
}

/// Experts of a group, if there are groups.
fn groups(cx: &Cx<'_>) -> usize {
    if cx.subject.model.n_group > 1 { cx.subject.experts_per_group() as usize } else { 0 }
}

fn busy(ui: &mut Ui, is_busy: bool) {
    if is_busy {
        ui.spinner();
    } else {
        ui.weak(format!("nothing was seen of {} yet", TapGroup::Routing.name()));
    }
}
