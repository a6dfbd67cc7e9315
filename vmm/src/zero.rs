//! Is a stretch of guest memory all zero? With the widest vectors that this processor has, which is found
//! out once.

use std::arch::x86_64::{
    __m256i, __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_or_si256, _mm256_setzero_si256,
    _mm256_testz_si256, _mm512_or_si512, _mm512_setzero_si512, _mm512_test_epi64_mask,
};
use std::ptr;
use std::sync::OnceLock;

/// Bytes between two looks at what has been found: most pages that are not zero differ in the first few.
const STEP: usize = 256;

/// How far ahead of what is looked at the processor is asked to fetch, in bytes: pages are looked at one after
/// the other, and the first bytes of nearly each are not in its caches.
const AHEAD: usize = 8 * 4096;

/// Looks at `len` bytes, a multiple of [`STEP`], from an address that is aligned to [`STEP`] on.
type Look = unsafe fn(*const u8, usize) -> bool;

/// Whether `len` bytes are all zero.
///
/// # Safety
/// The bytes must be mapped; the guest may write them at the same time. Both their address and `len` must be
/// multiples of 256.
pub(crate) unsafe fn is_zero(from: *const u8, len: usize) -> bool {
    static LOOK: OnceLock<Look> = OnceLock::new();
    debug_assert!((from as usize).is_multiple_of(STEP) && len.is_multiple_of(STEP));
    let look = LOOK.get_or_init(|| looks().last().copied().unwrap_or(words));
    let ahead = from.wrapping_add(AHEAD);
    for line in (0..STEP).step_by(64) {
        // SAFETY: a hint, which touches nothing, whatever the address is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line).cast()) };
    }
    // SAFETY: the caller vouches for the memory, and `looks` for the processor.
    unsafe { look(from, len) }
}

/// All that this processor can do, the widest last.
fn looks() -> Vec<Look> {
    let mut looks: Vec<Look> = vec![words];
    if is_x86_feature_detected!("avx2") {
        looks.push(avx2);
    }
    if is_x86_feature_detected!("avx512f") {
        looks.push(avx512);
    }
    looks
}

/// # Safety
/// As [`is_zero`].
unsafe fn words(from: *const u8, len: usize) -> bool {
    let words = from.cast::<u64>();
    for step in (0..len / 8).step_by(STEP / 8) {
        let mut any = 0;
        for i in step..step + STEP / 8 {
            // SAFETY: inside the stretch and aligned; volatile, for the guest may write.
            any |= unsafe { ptr::read_volatile(words.add(i)) };
        }
        if any != 0 {
            return false;
        }
    }
    true
}

/// # Safety
/// As [`is_zero`], on a processor with AVX2.
#[target_feature(enable = "avx2")]
unsafe fn avx2(from: *const u8, len: usize) -> bool {
    let vectors = from.cast::<__m256i>();
    for step in (0..len / 32).step_by(STEP / 32) {
        let mut any = _mm256_setzero_si256();
        for i in step..step + STEP / 32 {
            // SAFETY: inside the stretch and aligned; volatile, for the guest may write.
            any = _mm256_or_si256(any, unsafe { ptr::read_volatile(vectors.add(i)) });
        }
        if _mm256_testz_si256(any, any) == 0 {
            return false;
        }
    }
    true
}

/// # Safety
/// As [`is_zero`], on a processor with AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn avx512(from: *const u8, len: usize) -> bool {
    let vectors = from.cast::<__m512i>();
    for step in (0..len / 64).step_by(STEP / 64) {
        let mut any = _mm512_setzero_si512();
        for i in step..step + STEP / 64 {
            // SAFETY: inside the stretch and aligned; volatile, for the guest may write.
            any = _mm512_or_si512(any, unsafe { ptr::read_volatile(vectors.add(i)) });
        }
        if _mm512_test_epi64_mask(any, any) != 0 {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// Memory as a page is aligned.
    #[repr(align(4096))]
    #[derive(Clone)]
    struct Page([u8; 4096]);

    #[test]
    fn every_way_finds_every_bit() {
        let mut page = Page([0; 4096]);
        for look in looks() {
            // SAFETY: the page is this test's own, and `looks` names what the processor has.
            unsafe {
                assert!(look(page.0.as_ptr(), 4096));
                for at in 0..4096 {
                    page.0[at] = 1 << (at % 8);
                    assert!(!look(page.0.as_ptr(), 4096), "byte {at}");
                    assert!(!is_zero(page.0.as_ptr(), 4096), "byte {at}");
                    page.0[at] = 0;
                }
                // Nothing behind the end is looked at.
                page.0[2048] = 1;
                assert!(look(page.0.as_ptr(), 2048));
                page.0[2048] = 0;
            }
        }
    }

    /// A guard: looking at zero pages is not slower than copying them.
    #[test]
    fn to_look_costs_no_more_than_to_copy() {
        let from = vec![Page([0; 4096]); 256];
        let mut to = from.clone();
        let mut best = [Duration::MAX; 2];
        for _ in 0..50 {
            let begin = Instant::now();
            to.clone_from_slice(std::hint::black_box(&from));
            std::hint::black_box(&mut to);
            best[0] = best[0].min(begin.elapsed());
            let begin = Instant::now();
            for page in &from {
                // SAFETY: the page is this test's own.
                assert!(unsafe { is_zero(page.0.as_ptr(), 4096) });
            }
            best[1] = best[1].min(begin.elapsed());
        }
        assert!(best[1] < best[0] * 2, "copied in {:?}, looked at in {:?}", best[0], best[1]);
    }
}
