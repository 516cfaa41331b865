//! Drafts of multi-token prediction against what was written.

use egui::{Color32, Ui};
use egui_plot::{Bar as PlotBar, BarChart, Line, LineStyle, PlotPoints, Points};

use crate::analysis::drafts::{self, Along, Confidence, Draft, Kind, Share};
use crate::bars::still;
use crate::colour::kind;
use crate::heat::number;
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::store::{Part, Sequence, Store};
use crate::strip::{self, Look, Strip};
use crate::subject::Subject;
use crate::tally::{self, Bar, Widths};
use crate::view::{Cx, View};

/// Tokens that come between two counts of a text that is being written.
const STRIDE: usize = 16;

/// Drafts along the text, which came true, and where.
#[derive(Default)]
pub struct Mtp {
    mode: Mode,
    part: Written,
    seen: Latest<SeenKey, Seen>,
    strip: Strip,
    /// The token that the list was last scrolled to.
    listed: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Text,
    Counts,
}

/// Which tokens count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Written {
    #[default]
    All,
    Prompt,
    Generated,
}

impl Written {
    fn takes(self, draft: &Draft) -> bool {
        match self {
            Written::All => true,
            Written::Prompt => !draft.generated,
            Written::Generated => draft.generated,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct SeenKey {
    sequence: u32,
    part: Written,
    tokens: usize,
    version: u64,
}

/// What became of the drafts.
struct Seen {
    sequence: u32,
    /// Drafts of the selected text by the position of the token that they are for; all of them.
    by_token: Vec<Option<Draft>>,
    missing: usize,
    counts: Counts,
}

/// How many came true.
struct Counts {
    all: Share,
    positions: Vec<(usize, Share)>,
    kinds: [Share; 6],
    calibration: Vec<Confidence>,
    texts: Vec<(String, Share)>,
}

fn along(store: &Store) -> Vec<Along> {
    store.sequences().iter().map(Along::of).collect()
}

fn look(sequences: &[Along], number: u32, part: Written, subject: &Subject) -> Seen {
    let mut seen = Seen { sequence: number, by_token: Vec::new(), missing: 0, counts: count(&[], subject) };
    let mut texts = Vec::new();
    for sequence in sequences {
        let (drafts, missing) = sequence.drafts();
        let counted: Vec<Draft> = drafts.iter().copied().filter(|draft| part.takes(draft)).collect();
        if !counted.is_empty() {
            texts.push((sequence.name.clone(), Share::of(&counted)));
        }
        if sequence.number == number {
            seen.by_token = vec![None; sequence.len()];
            for draft in &drafts {
                seen.by_token[draft.position] = Some(*draft);
            }
            seen.missing = missing;
            seen.counts = count(&counted, subject);
        }
    }
    seen.counts.texts = texts;
    seen
}

fn count(drafts: &[Draft], subject: &Subject) -> Counts {
    Counts {
        all: Share::of(drafts),
        positions: drafts::by_position(drafts),
        kinds: drafts::by_kind(drafts, subject),
        calibration: drafts::calibration(drafts),
        texts: Vec::new(),
    }
}

impl View for Mtp {
    fn name(&self) -> &'static str {
        "mtp"
    }

    fn about(&self) -> &'static str {
        "Drafts of multi-token prediction, which guesses the token after next, against what was written."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        if cx.subject.model.mtp_modules == 0 {
            ui.label("This model has no modules of multi-token prediction, so it makes no drafts.");
            return;
        }
        let store = cx.store;
        let Some(sequence) = store.sequence(cx.selection.sequence).filter(|sequence| !sequence.tokens.is_empty())
        else {
            ui.weak("No text has been seen yet. Drafts appear as soon as a text runs.");
            return;
        };
        if drafts::find(sequence, Part::Ids).is_none() {
            ui.label("No drafts were recorded: record with --taps mtp");
            ui.weak("Drafts must be recorded from the beginning of a text on.");
            return;
        }
        self.header(ui);
        let key = SeenKey {
            sequence: sequence.info.number,
            part: self.part,
            tokens: if sequence.running { sequence.tokens.len() / STRIDE } else { sequence.tokens.len() },
            version: if store.sequences().iter().any(|text| text.running) {
                store.version() / 256
            } else {
                store.version()
            },
        };
        let subject = cx.subject;
        let found = self.seen.get_prepared(ui.ctx(), &key, || {
            let (sequences, subject) = (along(store), std::sync::Arc::clone(subject));
            move || look(&sequences, key.sequence, key.part, &subject)
        });
        let Some(seen) = found.filter(|seen| seen.sequence == sequence.info.number) else {
            ui.horizontal(|ui| {
                ui.spinner();
                ui.weak("comparing drafts with the text");
            });
            return;
        };
        let all = seen.counts.all;
        ui.label(format!("{} of the drafts are what was written ({} of {}).", percent(all), all.accepted, all.of))
            .on_hover_text(
                "The module drafts the token behind the next one from a hidden state and the next token of the text. It \
                 is compared with what the text has there: nothing was speculated, and drafts never changed the text.",
            );
        ui.weak("Agreement with the text as it stands (teacher-forced), not a speculative run.");
        if seen.missing > 0 {
            let text = format!(
                "{} tokens have no draft: dropped, gone to stay within memory, or run before drafts were recorded.",
                seen.missing
            );
            ui.colored_label(ui.visuals().warn_fg_color, text);
        }
        match self.mode {
            Mode::Text => text(ui, cx, sequence, seen, self.part, (&mut self.strip, &mut self.listed)),
            Mode::Counts => counts(ui, &seen.counts, cx.subject.pieces.is_empty()),
        }
    }

    fn parts(&self) -> &'static [&'static str] {
        &["text", "counts"]
    }

    fn show_part(&mut self, part: usize) {
        self.mode = [Mode::Text, Mode::Counts].get(part).copied().unwrap_or_default();
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let Some(sequence) = cx.sequence() else { return Vec::new() };
        let seen = look(&along(cx.store), sequence.info.number, self.part, cx.subject);
        let drafts: Vec<&Draft> = seen.by_token.iter().flatten().filter(|draft| self.part.takes(draft)).collect();
        if drafts.is_empty() {
            return Vec::new();
        }
        let axis = [("draft", drafts.len())];
        let integers = |name: &str, of: &dyn Fn(&Draft) -> i64| {
            Table::integers(format!("mtp.1.{name}"), &axis, drafts.iter().map(|draft| of(draft)).collect())
        };
        let mut tables = vec![
            integers("position", &|draft| draft.position as i64),
            integers("draft_id", &|draft| i64::from(draft.draft)),
            integers("written_id", &|draft| i64::from(draft.written)),
            integers("accepted", &|draft| i64::from(draft.is_accepted())),
            integers("generated", &|draft| i64::from(draft.generated)),
            integers("place_of_written", &|draft| draft.place.map_or(-1, |place| place as i64)),
            Table::floats("mtp.1.probability", &axis, drafts.iter().map(|draft| draft.probability).collect()),
        ];
        let mut shares = |of: &str, names: Vec<String>, shares: Vec<Share>| {
            let axis = [(of, shares.len())];
            tables.push(Table::words(format!("mtp.by_{of}.name"), of, names));
            let numbers = |number: &dyn Fn(&Share) -> usize| shares.iter().map(|s| number(s) as i64).collect();
            tables.push(Table::integers(format!("mtp.by_{of}.accepted"), &axis, numbers(&|share| share.accepted)));
            tables.push(Table::integers(format!("mtp.by_{of}.drafts"), &axis, numbers(&|share| share.of)));
        };
        let Counts { positions, kinds, calibration, texts, .. } = seen.counts;
        let (first, by_position) = positions.into_iter().map(|(first, share)| (first.to_string(), share)).unzip();
        shares("position", first, by_position);
        shares("kind", Kind::ALL.map(|kind| kind.name().to_owned()).to_vec(), kinds.to_vec());
        let (texts, by_text) = texts.into_iter().unzip();
        shares("text", texts, by_text);
        let mean = calibration.iter().map(|c| c.probability.to_string()).collect();
        shares("mean_probability", mean, calibration.iter().map(|c| c.share).collect());
        tables
    }

    fn is_busy(&self) -> bool {
        self.seen.is_busy()
    }
}

impl Mtp {
    fn header(&mut self, ui: &mut Ui) {
        ui.horizontal_wrapped(|ui| {
            let hint = "The text with what was drafted for each token";
            ui.selectable_value(&mut self.mode, Mode::Text, "text").on_hover_text(hint);
            let hint = "How many drafts came true: by position, kind of token, confidence, and text";
            ui.selectable_value(&mut self.mode, Mode::Counts, "counts").on_hover_text(hint);
            ui.separator();
            for (part, name, hint) in [
                (Written::All, "all tokens", "Drafts for tokens of the prompt and for those that the model wrote"),
                (Written::Prompt, "prompt", "Only drafts for tokens that were given"),
                (Written::Generated, "generated", "Only drafts for tokens that the model wrote itself"),
            ] {
                ui.selectable_value(&mut self.part, part, name).on_hover_text(hint);
            }
        });
    }
}

fn percent(share: Share) -> String {
    if share.of == 0 { "none".into() } else { format!("{:.1} %", 100.0 * share.rate()) }
}

/// Blue for drafts that came true, orange for others.
fn verdict(accepted: bool) -> Color32 {
    kind(usize::from(!accepted))
}

fn text(
    ui: &mut Ui,
    cx: &mut Cx<'_>,
    sequence: &Sequence,
    seen: &Seen,
    part: Written,
    kept: (&mut Strip, &mut Option<u32>),
) {
    let (strip, listed) = kept;
    let subject = cx.subject;
    let piece = |at: usize| sequence.tokens.get(at).map_or(String::new(), |token| subject.piece(token.id));
    let draft = |at: usize| seen.by_token.get(at).copied().flatten().filter(|draft| part.takes(draft));
    ui.horizontal(|ui| {
        for (accepted, name) in [(true, "as drafted"), (false, "drafted otherwise (underlined)")] {
            let (dot, _) = ui.allocate_exact_size(egui::vec2(12.0, 12.0), egui::Sense::hover());
            ui.painter().rect_filled(dot, 2.0, verdict(accepted));
            ui.weak(name);
        }
        ui.weak("— no colour: no draft");
    });
    let mut chosen = None;
    ui.horizontal_top(|ui| {
        let list = 380.0f32.min(ui.available_width() * 0.5);
        let size = egui::vec2(ui.available_width() - list - 12.0, ui.available_height());
        ui.allocate_ui_with_layout(size, egui::Layout::top_down(egui::Align::Min), |ui| {
            let spec = strip::Spec {
                name: "drafts along the text",
                tokens: sequence.tokens.len(),
                selected: cx.selection.token.map(|token| token as usize),
                piece: &piece,
                look: &|at| match draft(at) {
                    Some(draft) => {
                        Look { fill: Some(verdict(draft.is_accepted())), underlined: !draft.is_accepted(), weak: false }
                    }
                    None => Look { weak: true, ..Look::default() },
                },
                tooltip: &|at| match draft(at) {
                    Some(draft) => {
                        let likely = number(draft.probability);
                        format!("{at} {:?}: drafted {:?}, probability {likely}", piece(at), subject.piece(draft.draft))
                    }
                    None => format!("{at} {:?}: no draft", piece(at)),
                },
            };
            chosen = strip.show(ui, &spec);
        });
        ui.vertical(|ui| {
            details(ui, cx, sequence, seen);
            chosen = list_of_drafts(ui, cx, seen, part, listed).or(chosen);
        });
    });
    if let Some(at) = chosen {
        cx.selection.token = Some(at as u32);
    }
}

/// The module's likeliest tokens for the selected token.
fn details(ui: &mut Ui, cx: &Cx<'_>, sequence: &Sequence, seen: &Seen) {
    let Some(at) = cx.selection.token.map(|token| token as usize).filter(|at| *at < sequence.tokens.len()) else {
        ui.weak("Click a token to see what was drafted for it.");
        return;
    };
    let subject = cx.subject;
    let written = sequence.tokens[at].id;
    let row = at.checked_sub(1);
    let column = |part| drafts::find(sequence, part);
    let ids = row.zip(column(Part::Ids)).and_then(|(row, key)| sequence.ints(key, row));
    let probs = row.zip(column(Part::Probs)).and_then(|(row, key)| sequence.floats(key, row));
    let (Some(ids), Some(probs)) = (ids, probs) else {
        ui.label(format!("No draft for token {at} {:?}.", subject.piece(written)));
        return;
    };
    let place = seen.by_token.get(at).copied().flatten().and_then(|draft| draft.place);
    let verdict_text = match place {
        Some(0) => "as drafted".to_owned(),
        Some(place) => format!("drafted in place {}", place + 1),
        None => format!("not among the first {}", ids.len()),
    };
    ui.strong(format!("token {at} {:?}: {verdict_text}", subject.piece(written)));
    let bars: Vec<Bar> = ids
        .iter()
        .zip(probs)
        .map(|(id, p)| Bar {
            label: format!("{}{}", subject.piece(*id), if *id == written { "  = written" } else { "" }),
            value: *p,
            text: number(*p),
            hint: "Probability that the module gives to this token".into(),
            ..Bar::default()
        })
        .collect();
    let colour = if ui.visuals().dark_mode { kind(4) } else { kind(0) };
    tally::show(ui, "drafted", &bars, Widths { label: 130.0, text: 52.0 }, colour, false);
    ui.separator();
}

/// Every draft in a line. Returns the token that was clicked.
fn list_of_drafts(ui: &mut Ui, cx: &Cx<'_>, seen: &Seen, part: Written, listed: &mut Option<u32>) -> Option<usize> {
    let drafts: Vec<&Draft> = seen.by_token.iter().flatten().filter(|draft| part.takes(draft)).collect();
    ui.weak("token: draft (probability), and what was written");
    let mut chosen = None;
    let mut area = egui::ScrollArea::vertical().id_salt("drafts").auto_shrink([false, false]);
    if *listed != cx.selection.token {
        *listed = cx.selection.token;
        if let Some(row) = drafts.iter().position(|draft| Some(draft.position as u32) == *listed) {
            let height = 18.0 + ui.spacing().item_spacing.y;
            area = area.vertical_scroll_offset((row as f32 - 3.0).max(0.0) * height);
        }
    }
    area.show_rows(ui, 18.0, drafts.len(), |ui, shown| {
        for draft in &drafts[shown] {
            let selected = cx.selection.token == Some(draft.position as u32);
            let what = if draft.is_accepted() {
                "written".to_owned()
            } else {
                format!("written was {:?}", cx.subject.piece(draft.written))
            };
            let likely = number(draft.probability);
            let text = format!("{}: {:?} ({likely}) {what}", draft.position, cx.subject.piece(draft.draft));
            ui.horizontal(|ui| {
                ui.set_height(18.0);
                let (dot, _) = ui.allocate_exact_size(egui::vec2(8.0, 14.0), egui::Sense::hover());
                ui.painter().rect_filled(dot, 2.0, verdict(draft.is_accepted()));
                if ui.add(egui::Button::selectable(selected, text).truncate()).clicked() {
                    *listed = Some(draft.position as u32); // it is in sight
                    chosen = Some(draft.position);
                }
            });
        }
    });
    chosen
}

fn counts(ui: &mut Ui, counts: &Counts, no_words: bool) {
    ui.spacing_mut().item_spacing.x = 24.0;
    let colour = if ui.visuals().dark_mode { kind(4) } else { kind(0) };
    let height = ((ui.available_height() - 80.0) / 2.0).max(120.0);
    let rows = |shares: &mut dyn Iterator<Item = (String, Share)>| -> Vec<Bar> {
        let bar = |(label, share): (String, Share)| Bar {
            hint: format!("{label}: {} of {} drafts are what was written", share.accepted, share.of),
            label,
            value: if share.of == 0 { 0.0 } else { share.rate() },
            mark: None,
            text: if share.of == 0 { "no drafts".into() } else { format!("{} of {}", percent(share), share.of) },
        };
        shares.map(bar).collect()
    };
    let widths = Widths { label: 130.0, text: 110.0 };
    ui.columns(2, |columns| {
        let [left, right] = columns else { return };
        left.strong("by position in the text");
        let bars = counts.positions.iter().zip(counts.positions.iter().skip(1).map(Some).chain([None]));
        let step = counts.positions.get(1).map_or(1, |bin| bin.0).max(1);
        let bars = bars.filter(|((_, share), _)| share.of > 0).map(|((first, share), _)| {
            let middle = *first as f64 + step as f64 / 2.0;
            let name = format!("tokens {first} to {}: {} of {}", first + step - 1, percent(*share), share.of);
            PlotBar::new(middle, f64::from(share.rate())).width(step as f64 * 0.9).name(name)
        });
        let chart = BarChart::new("accepted", bars.collect())
            .color(colour)
            .element_formatter(Box::new(|bar, _| bar.name.clone()));
        let plot = still("by position", "token", "accepted").height(height).include_y(0.0).include_y(1.0);
        plot.show(left, |plot| plot.bar_chart(chart));

        right.strong("by confidence").on_hover_text(
            "Drafts in groups of about equal probability. On the dashed line a module that says 70 % is right in 70 % of \
             the cases; below it, it promises too much.",
        );
        let points: Vec<[f64; 2]> = counts
            .calibration
            .iter()
            .map(|group| [f64::from(group.probability), f64::from(group.share.rate())])
            .collect();
        let numbers: Vec<String> = counts
            .calibration
            .iter()
            .map(|group| format!("mean probability {}: {} of {}", number(group.probability), percent(group.share), group.share.of))
            .collect();
        let plot = still("by confidence", "mean probability of the draft", "accepted")
            .height(height)
            .x_grid_spacer(egui_plot::uniform_grid_spacer(|_| [1.0, 0.5, 0.25]))
            .include_y(0.0)
            .include_x(0.0)
            .include_x(1.0)
            .include_y(1.0)
            .label_formatter(move |at| match at {
                egui_plot::HoverPosition::NearDataPoint { plot_name, index, .. } if *plot_name == "drafts" => {
                    numbers.get(*index).cloned()
                }
                _ => None,
            });
        plot.show(right, |plot| {
            let ideal = PlotPoints::from(vec![[0.0, 0.0], [1.0, 1.0]]);
            let grey = Color32::from_gray(128);
            plot.line(Line::new("as promised", ideal).color(grey).style(LineStyle::dashed_loose()).allow_hover(false));
            plot.line(Line::new("drafts", PlotPoints::from(points.clone())).color(colour).allow_hover(false));
            plot.points(Points::new("drafts", PlotPoints::from(points)).radius(4.0).color(colour));
        });
    });
    ui.add_space(6.0);
    ui.columns(2, |columns| {
        let [left, right] = columns else { return };
        left.strong("by kind of token");
        if no_words {
            left.weak("Without a tokenizer all tokens are of an unknown kind.");
        }
        let mut kinds = Kind::ALL.iter().map(|kind| kind.name().to_owned()).zip(counts.kinds);
        tally::show(left, "kind", &rows(&mut kinds), widths, colour, false);
        right.strong("by text");
        let area = egui::ScrollArea::vertical().id_salt("texts");
        area.show(right, |ui| {
            tally::show(ui, "text", &rows(&mut counts.texts.iter().cloned()), widths, colour, false);
        });
    });
}
