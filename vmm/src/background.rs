//! Threads whose work can wait a moment.
//!
//! A thread that receives pages is woken by each portion that comes, some ten thousand times a second. By default
//! Linux lets a thread that wakes up have the processor of whoever uses it, if that has had its share: a vCPU, where
//! there are not more processors than threads. So the guest would be stopped as often, to read 64 KiB each time. A
//! thread of SCHED_BATCH has the same share of the processors, and does not stop anyone when it wakes up (sched(7)):
//! guests are stopped less often, and more is read at a time.

/// What the kernel calls the thread that calls.
const CALLER: libc::pid_t = 0;

/// Has the calling thread, and those that it starts, give way to others when it wakes up (`true`), or not any more.
/// Nothing happens where the process was started under another policy than the usual one: that was someone's choice.
pub fn give_way(way: bool) {
    // SAFETY: getpid() has no preconditions.
    let first_thread = unsafe { libc::getpid() };
    let Some(to) = change(way, policy(CALLER), policy(first_thread)) else { return };
    // SAFETY: all zeros are a value of this struct of integers; zero is the only priority of both policies.
    let priority: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: changes when the calling thread runs, and reads the struct.
    if unsafe { libc::sched_setscheduler(CALLER, to, &priority) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, way, "a thread's policy stays as it is");
    }
}

/// The policy that a thread under `own` gets in a process whose first thread is under `first`, if it gets another.
fn change(way: bool, own: libc::c_int, first: libc::c_int) -> Option<libc::c_int> {
    let (from, to) = match way {
        true => (libc::SCHED_OTHER, libc::SCHED_BATCH),
        false => (libc::SCHED_BATCH, libc::SCHED_OTHER),
    };
    (own == from && first == libc::SCHED_OTHER).then_some(to)
}

/// A thread's policy, or a negative number.
fn policy(thread: libc::pid_t) -> libc::c_int {
    // SAFETY: reads a number.
    unsafe { libc::sched_getscheduler(thread) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_policy_that_someone_has_chosen_stays() {
        let (batch, other) = (libc::SCHED_BATCH, libc::SCHED_OTHER);
        assert_eq!(
            (change(true, other, other), change(false, batch, other)),
            (Some(batch), Some(other))
        );
        assert_eq!((change(true, batch, other), change(false, other, other)), (None, None));
        for chosen in [batch, libc::SCHED_IDLE, libc::SCHED_FIFO] {
            for way in [true, false] {
                assert_eq!(change(way, chosen, chosen), None, "{chosen}");
            }
        }
    }

    #[test]
    fn a_thread_gives_way_with_those_that_it_starts_until_it_does_not() {
        let here = || thread::spawn(|| policy(CALLER)).join().unwrap();
        let there = thread::spawn(move || {
            give_way(true);
            let given = (policy(CALLER), here());
            give_way(false);
            (given, (policy(CALLER), here()))
        });
        let (batch, other) = (libc::SCHED_BATCH, libc::SCHED_OTHER);
        assert_eq!(there.join().unwrap(), ((batch, batch), (other, other)));
        assert_eq!(policy(CALLER), other, "another thread was changed");
    }
}
