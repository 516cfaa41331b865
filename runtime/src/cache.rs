//! Pages of the latent cache beyond one sequence: beginnings that sequences share, copies, and their way to the host and
//! back.

use std::sync::Arc;

use moewe_plan::PAGE_TOKENS;
use wgpu::BufferUsages;

use crate::pages::Page;
use crate::{Error, Gpu, Result, SequenceId, Session};

impl Session {
    /// Lets a fresh sequence begin with latents that were computed for the same tokens before: whole `pages`, which it
    /// shares, and the first tokens of one more, which is copied. Of the sequence's tokens at least one must be left to
    /// run. `drafted` says whether modules of multi-token prediction have latents there, too.
    ///
    /// That the pages belong to these tokens is the caller's promise.
    pub fn adopt(
        &mut self,
        sequence: SequenceId,
        pages: &[Page],
        partial: Option<(Page, usize)>,
        drafted: bool,
    ) -> Result<()> {
        let page_tokens = PAGE_TOKENS as usize;
        let tokens = pages.len() * page_tokens + partial.map_or(0, |(_, tokens)| tokens);
        let fresh = self.slots.get(sequence)?;
        let sound = fresh.cached == 0 && fresh.pages.is_empty() && tokens < fresh.tokens.len();
        if !sound || partial.is_some_and(|(_, tokens)| tokens == 0 || tokens >= page_tokens) {
            let (all, cached) = (fresh.tokens.len(), fresh.cached);
            let what = format!("{tokens} tokens for a beginning of a sequence of {all}, {cached} of them run");
            return Err(Error::Batch { what });
        }
        let mut shared = Vec::with_capacity(pages.len() + 1);
        for &page in pages {
            if let Err(error) = self.pages.share(page) {
                self.pages.give_back(shared);
                return Err(error);
            }
            shared.push(page);
        }
        if let Some((page, _)) = partial {
            match self.copy_of(page) {
                Ok(copy) => shared.push(copy),
                Err(error) => {
                    self.pages.give_back(shared);
                    return Err(error);
                }
            }
        }
        self.slots.get_mut(sequence)?.begin_with(shared, tokens, drafted);
        Ok(())
    }

    /// The pages of a sequence, in the order of its tokens.
    pub fn pages_of(&self, sequence: SequenceId) -> Result<&[Page]> {
        Ok(&self.slots.get(sequence)?.pages)
    }

    /// Whether modules of multi-token prediction have latents of all tokens that the sequence has run.
    pub fn is_drafted(&self, sequence: SequenceId) -> Result<bool> {
        let sequence = self.slots.get(sequence)?;
        Ok(sequence.module_cache.hole == [0; 2] && sequence.module_cache.end == sequence.cached)
    }

    /// Keeps a page that is in use, beyond the sequence that filled it.
    pub fn hold(&mut self, page: Page) -> Result<()> {
        self.pages.share(page)
    }

    /// Ends [`Session::hold`] of each page. A page that nobody uses any more is free.
    pub fn release(&mut self, pages: &[Page]) {
        self.pages.give_back(pages.iter().copied());
    }

    /// How many sequences and holders use a page.
    pub fn page_users(&self, page: Page) -> u32 {
        self.pages.users(page)
    }

    /// A free page, held by the caller, with these contents ([`Session::read_page`]).
    ///
    /// # Errors
    /// [`Error::OutOfPages`], or [`Error::Batch`] if there are more or fewer bytes than a page has.
    pub fn load_page(&mut self, bytes: &[u8]) -> Result<Page> {
        if bytes.len() as u64 != self.page_bytes() {
            let what = format!("{} bytes for a page of {}", bytes.len(), self.page_bytes());
            return Err(Error::Batch { what });
        }
        let page = self.take_page()?;
        let gpu = self.model.gpu();
        let written = gpu.scoped(|| {
            let mut rest = bytes;
            for (cache, size) in self.buffers.caches(self.model.plan()) {
                let (now, later) = rest.split_at(size as usize);
                gpu.queue.write_buffer(&cache.raw, u64::from(page) * size, now);
                rest = later;
            }
        });
        if let Err(error) = written {
            let error = gpu.refused("a page", &error);
            self.pages.give_back([page]);
            return Err(error);
        }
        Ok(page)
    }

    /// The contents of a page: the latents of all layers, behind one another.
    pub fn read_page(&self, page: Page) -> Result<Vec<u8>> {
        let caches = self.buffers.caches(self.model.plan());
        let sources: Vec<_> = caches.iter().map(|&(cache, size)| (cache, u64::from(page) * size, size)).collect();
        let gpu = self.model.gpu();
        let words = gpu.read(gpu.encoder("page"), &sources)?;
        Ok(bytemuck::cast_slice(&words).to_vec())
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> u64 {
        self.buffers.caches(self.model.plan()).iter().map(|(_, size)| size).sum()
    }

    /// A page of one's own with the contents of another.
    pub(crate) fn copy_of(&mut self, page: Page) -> Result<Page> {
        let copy = self.take_page()?;
        if let Err(error) = self.copy_page(page, copy) {
            self.pages.give_back([copy]);
            return Err(error);
        }
        Ok(copy)
    }

    fn take_page(&mut self) -> Result<Page> {
        let mut taken = Vec::new();
        self.pages.ensure([(&mut taken, 1)].into_iter())?;
        Ok(taken[0])
    }

    fn copy_page(&self, from: Page, to: Page) -> Result<()> {
        let gpu: &Arc<Gpu> = self.model.gpu();
        let caches = self.buffers.caches(self.model.plan());
        let bytes = caches.iter().map(|(_, size)| size).sum();
        // A buffer cannot be copied to itself.
        let usage = BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let between = gpu.buffer_up_to("a page", bytes, usage, gpu.limits.max_buffer_size)?;
        let mut encoder = gpu.encoder("copy of a page");
        let mut at = 0;
        for &(cache, size) in &caches {
            encoder.copy_buffer_to_buffer(&cache.raw, u64::from(from) * size, &between.raw, at, size);
            at += size;
        }
        at = 0;
        for &(cache, size) in &caches {
            encoder.copy_buffer_to_buffer(&between.raw, at, &cache.raw, u64::from(to) * size, size);
            at += size;
        }
        gpu.submit(gpu.finish(encoder)?)?;
        Ok(())
    }

    /// Writes zeros to one token's row of a page.
    pub(crate) fn clear_row(&self, page: Page, row: usize) {
        for (cache, size) in self.buffers.caches(self.model.plan()) {
            let bytes = size / u64::from(PAGE_TOKENS);
            let zeros = vec![0; bytes as usize];
            self.model.gpu().queue.write_buffer(&cache.raw, u64::from(page) * size + row as u64 * bytes, &zeros);
        }
    }
}
