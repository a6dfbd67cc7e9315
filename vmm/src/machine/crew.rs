//! Threads that do a share of short work at once, while the guest stands still.
//!
//! A thread that is woken runs where it ran last, or where it was woken from, unless Linux finds an idle processor for
//! it; and it looks less far, or not at all, where all have been busy lately, as while memory was sent. So a share
//! that could be done beside another is done behind it, and a processor is idle (seen in traces of Linux 6.18). A hand
//! is kept off the processor of whoever gives it work. The vCPUs' own threads can't be: where they run is the
//! operator's choice.

use std::io;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::{Pid, gettid};

use crate::background::give_way;

type Job = Box<dyn FnOnce() + Send>;

/// Some threads that wait for work.
pub(super) struct Crew(Vec<Hand>);

/// One of them.
pub(super) struct Hand {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// Where it may run, and the processor that it is kept off.
    place: Mutex<Option<(Place, Option<usize>)>>,
}

struct Place {
    thread: Pid,
    allowed: CpuSet,
}

impl Crew {
    /// So many threads, which wait until they are given something.
    pub(super) fn muster(count: usize) -> io::Result<Self> {
        (0..count).map(Hand::new).collect::<io::Result<_>>().map(Self)
    }

    /// All of them.
    pub(super) fn hands(&self) -> &[Hand] {
        &self.0
    }
}

impl Hand {
    fn new(index: usize) -> io::Result<Self> {
        let (jobs, work) = mpsc::sync_channel::<Job>(1);
        let (here, there) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name(format!("hand{index}")).spawn(move || {
            // Whoever starts it may be one that can wait.
            give_way(false);
            let thread = gettid();
            let allowed = sched_getaffinity(thread).ok();
            let _ = here.send(allowed.map(|allowed| Place { thread, allowed }));
            work.iter().for_each(|job| job());
        })?;
        let place = there.recv().unwrap_or_default().map(|place| (place, None));
        Ok(Self { jobs: Some(jobs), thread: Some(thread), place: Mutex::new(place) })
    }

    /// Does `job`, which does not panic, elsewhere than on this processor if there is another one. The answer comes
    /// through the receiver.
    pub(super) fn start<R: Send + 'static>(
        &self,
        job: impl FnOnce() -> R + Send + 'static,
    ) -> Receiver<R> {
        self.step_aside();
        let (answer, answers) = mpsc::sync_channel(1);
        let job: Job = Box::new(move || {
            let _ = answer.send(job());
        });
        // One that has panicked all the same takes none: the receiver hears of it.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(job));
        answers
    }

    /// Keeps it off the processor of who calls.
    fn step_aside(&self) {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some((place, kept_off)), Ok(here)) = (&mut *place, sched_getcpu()) else { return };
        if *kept_off == Some(here) {
            return;
        }
        let mut elsewhere = place.allowed;
        let others = elsewhere.unset(here).is_ok()
            && (0..CpuSet::count()).any(|cpu| elsewhere.is_set(cpu) == Ok(true));
        let to = if others { elsewhere } else { place.allowed };
        match sched_setaffinity(place.thread, &to) {
            Ok(()) => *kept_off = Some(here),
            Err(error) => tracing::debug!(%error, "a thread stays where it is"),
        }
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // What a panic had to say, whoever waited for the answer has said.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_by_another_thread_on_another_processor() {
        let crew = Crew::muster(2).unwrap();
        let [one, other] = crew.hands() else { panic!("{}", crew.hands().len()) };
        let me = gettid();
        let allowed = sched_getaffinity(me).unwrap();
        let processors =
            (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true)).count();
        for _ in 0..100 {
            // This thread may be moved at any time, so what counts is what the hand was told to keep off.
            let answers = [one, other].map(|hand| {
                hand.start(|| (gettid(), sched_getaffinity(gettid()).unwrap(), sched_getcpu()))
            });
            for (hand, answer) in [one, other].into_iter().zip(answers) {
                let (thread, mask, cpu) = answer.recv().unwrap();
                assert_ne!(thread, me);
                let kept_off = hand.place.lock().unwrap().as_ref().unwrap().1.unwrap();
                if processors > 1 {
                    assert_eq!(mask.is_set(kept_off), Ok(false));
                    assert_ne!(cpu, Ok(kept_off));
                }
            }
        }
    }

    #[test]
    fn a_job_that_panics_gives_no_answer_and_neither_does_the_next() {
        let crew = Crew::muster(1).unwrap();
        let hand = &crew.hands()[0];
        assert_eq!(hand.start(|| 7).recv(), Ok(7));
        assert!(hand.start(|| panic!("on purpose")).recv().is_err());
        assert!(hand.start(|| 7).recv().is_err());
    }
}
