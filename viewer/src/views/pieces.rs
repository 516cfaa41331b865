//! Tokens as they are drawn: white space visible but quiet.

use egui::text::{LayoutJob, TextFormat};
use egui::{Color32, FontId};

use crate::subject::Subject;

/// The text of a token with its white space as signs, and whether each character is such a sign.
pub fn signs(subject: &Subject, id: u32) -> Vec<(char, bool)> {
    let Some(piece) = subject.pieces.get(id as usize).filter(|piece| !piece.is_empty()) else {
        return format!("#{id}").chars().map(|c| (c, true)).collect();
    };
    let sign = |c: char| match c {
        '\n' => ('¶', true),
        '\t' => ('»', true),
        c if c.is_whitespace() || c.is_control() => ('·', true),
        c => (c, false),
    };
    piece.chars().map(sign).collect()
}

/// A token as a word of labels and tables.
pub fn word(subject: &Subject, id: u32) -> String {
    signs(subject, id).into_iter().map(|(c, _)| c).collect()
}

/// A token to lay out: signs are fainter than the rest.
pub fn job(subject: &Subject, id: u32, font: &FontId, colour: Color32) -> LayoutJob {
    let mut job = LayoutJob::default();
    append(&mut job, subject, id, font, colour);
    job.wrap.max_width = f32::INFINITY;
    job
}

/// Puts a token behind others.
pub fn append(job: &mut LayoutJob, subject: &Subject, id: u32, font: &FontId, colour: Color32) {
    let signs = signs(subject, id);
    for run in signs.chunk_by(|a, b| a.1 == b.1) {
        let text: String = run.iter().map(|(c, _)| c).collect();
        let colour = if run[0].1 { colour.gamma_multiply(0.45) } else { colour };
        job.append(&text, 0.0, TextFormat::simple(font.clone(), colour));
    }
}

/// Whether a line may break before a token, and whether one ends behind it.
pub fn breaks(subject: &Subject, id: u32) -> (bool, bool) {
    match subject.pieces.get(id as usize) {
        Some(piece) => (piece.starts_with(char::is_whitespace), piece.contains('\n')),
        None => (true, false),
    }
}
