//! Drafts behind watched runs: module 1 of multi-token prediction reads the hidden rows that a run left, and for each of
//! its tokens the one behind it, at that token's position (spec §7).

use moewe_plan::{FrameToken, Role, TokenInfo};

use crate::watch::{DRAFT, WatchedRun};
use crate::{Batch, Error, Result, SequenceId, Session};

impl Session {
    /// Takes pages for sequences of these lengths. If drafts are wanted, they run behind at most `rows` tokens at once, and
    /// the return value says whether they do: a draft stands one position further than its token, so at the end of the
    /// context or of the cache there is none.
    pub(crate) fn ensure_with_drafts(&mut self, wanted: &[(SequenceId, usize)], rows: usize) -> Result<bool> {
        let fresh = wanted.iter().any(|&(id, _)| self.slots.get(id).is_ok_and(|sequence| sequence.drafted));
        if fresh && self.reads_drafts() && rows <= self.draft_capacity()? {
            let longer: Vec<_> = wanted.iter().map(|&(id, length)| (id, length + 1)).collect();
            if self.ensure_all(&longer).is_ok() {
                return Ok(true);
            }
        }
        self.ensure_all(wanted)?;
        Ok(false)
    }

    /// Tokens that one draft takes, all of them with logits.
    pub(crate) fn draft_capacity(&self) -> Result<usize> {
        let (tokens, rows) = self.capacity(DRAFT)?;
        Ok(tokens.min(rows))
    }

    /// Notes that runs of these sequences had no drafts behind them.
    pub(crate) fn end_drafts(&mut self, sequences: &[SequenceId]) -> Result<()> {
        sequences.iter().try_for_each(|&id| {
            self.slots.get_mut(id)?.drafted = false;
            Ok(())
        })
    }

    /// The draft behind a run whose sampled tokens have become the next batch.
    pub(crate) fn draft_of_next(&mut self, batch: &Batch) -> Result<WatchedRun> {
        let rows: Vec<u32> = (0..batch.tokens.len() as u32).collect();
        let run = self.select(DRAFT, batch.tokens.len(), &rows)?;
        let tokens = self.draft_tokens(&batch.tokens, 1)?;
        self.watched(run, tokens, false)
    }

    /// Runs the draft behind a run of `batch`, which was submitted. What was sampled for its rows, and follows their
    /// tokens, begins at `word` of the ring of finished tokens.
    pub(crate) fn draft_behind(&mut self, batch: &Batch, word: u64) -> Result<()> {
        let shift = |token: &TokenInfo| {
            let id = token.next.saturating_sub(1);
            TokenInfo { id, position: token.position + 1, sequence: token.sequence, next: 0 }
        };
        let tokens = batch.tokens.iter().map(shift).collect();
        let shifted = Batch { tokens, rows: Vec::new() }.with_all_rows();
        let run = self.start(DRAFT, &shifted)?;
        let rows = self.draft_tokens(&shifted.tokens, 0)?;
        let draft = self.watched(run, rows, false)?;
        let mut encoder = self.model.gpu().encoder("draft");
        let (Some(finished), Some(target)) = (self.buffers.role(Role::Finished), self.buffers.role(Role::Tokens))
        else {
            return Err(Error::Plan { what: "its watch programs have no buffer of finished tokens".into() });
        };
        for (row, &token) in batch.rows.iter().enumerate() {
            let at = (word + row as u64) * 4;
            encoder.copy_buffer_to_buffer(&finished.raw, at, &target.raw, u64::from(token) * 16, 4);
        }
        self.record_watched(&draft, &mut encoder, 0);
        self.submit(encoder)
    }

    /// Rows of a draft's frame: those whose sequence was followed by drafts from its start.
    fn draft_tokens(&self, batch: &[TokenInfo], ahead: u32) -> Result<Vec<Option<FrameToken>>> {
        let mut rows = self.frame_tokens(batch)?;
        for (row, token) in rows.iter_mut().zip(batch) {
            let sequence = self.slots.get(self.slots.by_slot(token.sequence)?)?;
            *row =
                row.filter(|_| sequence.drafted).map(|token| FrameToken { position: token.position + ahead, ..token });
        }
        Ok(rows)
    }
}
