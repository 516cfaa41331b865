//! How much memory latents spare.

use egui::{Ui, vec2};

use crate::analysis::latents::CacheBytes;
use crate::colour::kind;
use crate::numbers::Table;
use crate::view::Cx;

/// Counts of tokens that are compared, with what they are.
fn cases(cx: &Cx<'_>) -> Vec<(String, u64)> {
    let mut cases = vec![("one token".to_owned(), 1)];
    if let Some(sequence) = cx.sequence().filter(|sequence| !sequence.tokens.is_empty()) {
        let tokens = sequence.tokens.len() as u64;
        cases.push((format!("“{}”, {tokens} tokens", sequence.info.name), tokens));
    }
    let all: u64 = cx.store.sequences().iter().map(|sequence| sequence.tokens.len() as u64).sum();
    if cx.store.sequences().len() > 1 {
        cases.push((format!("all texts, {all} tokens"), all));
    }
    let most = u64::from(cx.subject.model.max_context);
    cases.push((format!("the longest context, {most} tokens"), most));
    cases
}

pub(super) fn show(ui: &mut Ui, cx: &Cx<'_>) {
    let Some(bytes) = CacheBytes::of(&cx.subject.model, &cx.subject.precision) else {
        ui.weak(format!("Precision {:?} is not known, so bytes cannot be told.", cx.subject.precision));
        return;
    };
    let model = &cx.subject.model;
    ui.strong(format!("Latents need {:.1} times less memory than plain attention.", bytes.ratio()));
    ui.label(format!(
        "A token's latent: {} + {} = {} numbers in each of {} layers (kv_lora_rank + qk_rope_head_dim).",
        model.kv_lora_rank, model.qk_rope_head_dim, bytes.latent_numbers, bytes.layers
    ));
    ui.label(format!(
        "Keys and values of {} heads: {} × ({} + {} + {}) = {} numbers (qk_nope + qk_rope + v of each head).",
        model.num_attention_heads,
        model.num_attention_heads,
        model.qk_nope_head_dim,
        model.qk_rope_head_dim,
        model.v_head_dim,
        bytes.plain_numbers
    ));
    ui.weak(format!(
        "{} bytes a number at precision {}; computed from the model's shape, without layers of multi-token prediction and \
         without the unfilled ends of cache pages.",
        bytes.number_bytes, cx.subject.precision
    ));
    for (name, tokens) in cases(cx) {
        ui.add_space(10.0);
        ui.label(name);
        bar(ui, "latents", bytes.latent(tokens), bytes.plain(tokens), kind(2));
        bar(ui, "plain", bytes.plain(tokens), bytes.plain(tokens), kind(5));
    }
}

/// A bar as long as its share of the most, with its bytes.
fn bar(ui: &mut Ui, name: &str, bytes: u64, most: u64, colour: egui::Color32) {
    let text = format!("{name}: {}", in_units(bytes));
    let (outer, response) = ui.allocate_exact_size(vec2(ui.available_width().min(640.0), 18.0), egui::Sense::hover());
    response.widget_info(|| egui::WidgetInfo::labeled(egui::Role::Label, true, &text));
    let area = egui::Rect::from_min_max(outer.min + vec2(160.0, 2.0), outer.max - vec2(0.0, 2.0));
    let width = (area.width() * bytes as f32 / most.max(1) as f32).max(1.0);
    let painter = ui.painter();
    painter.rect_filled(area, 2.0, ui.visuals().faint_bg_color);
    painter.rect_filled(egui::Rect::from_min_size(area.min, vec2(width, area.height())), 2.0, colour);
    let font = egui::TextStyle::Body.resolve(ui.style());
    let at = egui::pos2(outer.min.x, outer.center().y);
    painter.text(at, egui::Align2::LEFT_CENTER, text, font, ui.visuals().text_color());
}

/// Bytes as people read them.
fn in_units(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let power = (0..units.len() - 1).find(|&power| bytes >> (10 * power) < 1024).unwrap_or(units.len() - 1);
    if power == 0 {
        format!("{bytes} bytes")
    } else {
        format!("{:.1} {}", bytes as f64 / (1u64 << (10 * power)) as f64, units[power])
    }
}

pub(super) fn tables(cx: &Cx<'_>) -> Vec<Table> {
    let Some(bytes) = CacheBytes::of(&cx.subject.model, &cx.subject.precision) else { return Vec::new() };
    let (names, tokens): (Vec<String>, Vec<u64>) = cases(cx).into_iter().unzip();
    let axes = [("case", tokens.len())];
    let each = |of: &dyn Fn(u64) -> u64| tokens.iter().map(|&n| i64::try_from(of(n)).unwrap_or(i64::MAX)).collect();
    vec![
        Table::words("latents.bytes.case", "case", names),
        Table::integers("latents.bytes.tokens", &axes, each(&|tokens| tokens)),
        Table::integers("latents.bytes.latent", &axes, each(&|tokens| bytes.latent(tokens))),
        Table::integers("latents.bytes.plain", &axes, each(&|tokens| bytes.plain(tokens))),
    ]
}

#[cfg(test)]
mod tests {
    use super::in_units;

    #[test]
    fn bytes_are_readable() {
        let shown = [0, 1023, 1024, 70_272, 5 << 30, u64::MAX].map(in_units);
        assert_eq!(shown, ["0 bytes", "1023 bytes", "1.0 KiB", "68.6 KiB", "5.0 GiB", "16384.0 PiB"]);
    }
}
