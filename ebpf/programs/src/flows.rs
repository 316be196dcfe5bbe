//! Where a redirected connection is between the application's first packet and the moment at
//! which the proxy's side is established: what was asked for, found by the four-tuple.
//!
//! Nearly every one has a slot of an array for itself for these few microseconds, which takes no
//! memory and no call of a helper. One that finds another connection there goes into a hash.

use shunt_abi::{ASKED_IN_FLOWS, Asked, Endpoint, FlowKey, FlowSlot};

use crate::{
    atomic::Word,
    ctx::HelperFailed,
    facts::loopback_like,
    maps::{FLOW_SLOT_COUNT, FLOW_SLOTS, FLOWS},
};

/// Lets the proxy's side find what the application asked for. Fails when there is no room.
///
/// The key is changed in its place, here and below: the stack has no room for two.
#[inline(always)]
pub fn publish(key: &mut FlowKey, asked: &mut Asked) -> Result<(), HelperFailed> {
    if let Some(place) = Place::of(key)
        && (place.write(key, &asked.destination)
            // Of this very connection it can only be what is left of a former one.
            || (place.free_of(key) && place.write(key, &asked.destination)))
    {
        return Ok(());
    }
    asked.flags |= ASKED_IN_FLOWS;
    insert(key, asked)?;
    if !key.server.is_loopback() {
        turn_to_twin(key);
        insert(key, asked)?;
    }
    Ok(())
}

#[inline(always)]
fn insert(key: &FlowKey, asked: &Asked) -> Result<(), HelperFailed> {
    let inserted = FLOWS.insert(key, &asked.destination, 0);
    inserted.map_err(|_error| HelperFailed)
}

/// Takes out what was asked for by a connection that has arrived.
#[inline(always)]
pub fn take(key: &mut FlowKey) -> Option<Endpoint> {
    if let Some(asked) = Place::of(key).and_then(|place| place.take(key)) {
        return Some(asked);
    }
    // SAFETY: an element is written once and removed by the two ends of one
    // connection; this is one of them, the other still waits.
    let asked = unsafe { FLOWS.get(&*key) }.copied()?;
    remove(key);
    Some(asked)
}

/// Whether a redirected connection is under way.
#[inline(always)]
pub fn is_published(key: &FlowKey) -> bool {
    let in_slot = Place::of(key).is_some_and(|place| {
        let state = place.holds(|found| found.arrives_as(key));
        state.is_some_and(|state| place.state() == state)
    });
    // SAFETY: the element is not looked into.
    in_slot || unsafe { FLOWS.get(key) }.is_some()
}

/// Takes a connection out that nobody may have taken.
#[inline(always)]
pub fn withdraw(key: &mut FlowKey, asked: &Asked) {
    if let Some(place) = Place::of(key) {
        place.free_of(key);
    }
    if asked.flags & ASKED_IN_FLOWS != 0 {
        remove(key);
    }
}

/// Removes a connection from the hash, wherever it may have ended up.
#[inline(always)]
fn remove(key: &mut FlowKey) {
    let _ = FLOWS.remove(&*key);
    turn_to_twin(key);
    let _ = FLOWS.remove(&*key);
}

/// Turns the key to the other place of the proxy's port where a connection may end up, as
/// [`FlowKey::arrives_as`] has it: in the hash it has an entry for each.
#[inline(always)]
fn turn_to_twin(key: &mut FlowKey) {
    key.server = if key.server.is_loopback() {
        key.client
    } else {
        loopback_like(&key.server)
    };
}

/// A slot in the map, which other processors read and write ([`FlowSlot`]).
#[derive(Clone, Copy)]
struct Place(*mut FlowSlot);

impl Place {
    /// That of a connection; `None` where the map was made smaller.
    #[inline(always)]
    fn of(key: &FlowKey) -> Option<Self> {
        FLOW_SLOTS.get_ptr_mut(key.slot(FLOW_SLOT_COUNT)).map(Self)
    }

    /// Publishes a connection here, unless there is another.
    #[inline(always)]
    fn write(self, key: &FlowKey, asked: &Endpoint) -> bool {
        // Looked at without order: nobody reads what was here, and `advance` has the last word.
        let state = self.slot().state;
        if !FlowSlot::is_free(state) || !self.advance(state) {
            return false;
        }
        // SAFETY: an element of the map, which stays. Who has changed its state from free
        // owns the rest.
        unsafe {
            (*self.0).key = *key;
            (*self.0).asked = *asked;
        }
        self.advance(FlowSlot::next(state))
    }

    /// Takes out what a connection asked for that has arrived, if it is here.
    #[inline(always)]
    fn take(self, key: &FlowKey) -> Option<Endpoint> {
        let state = self.holds(|found| found.arrives_as(key))?;
        let asked = self.slot().asked;
        // Whoever frees it has had it for himself until now.
        self.advance(state).then_some(asked)
    }

    /// Takes this connection out, if it is here, and whether it was: the other end may have
    /// been faster.
    #[inline(always)]
    fn free_of(self, key: &FlowKey) -> bool {
        let state = self.holds(|found| found.same(key));
        state.is_some_and(|state| self.advance(state))
    }

    /// Its state, if it is that of a published connection like this. Who has to see one that
    /// was published comes after that, by the packet or the socket: so at first a look
    /// without order will do.
    #[inline(always)]
    fn holds(self, is_this: impl FnOnce(&FlowKey) -> bool) -> Option<u64> {
        if !FlowSlot::is_published(self.slot().state) {
            return None;
        }
        let state = self.state();
        let is_this = FlowSlot::is_published(state) && is_this(&self.slot().key);
        is_this.then_some(state)
    }

    /// Its state. What was written before it came to be is read after this.
    #[inline(always)]
    fn state(self) -> u64 {
        self.word().load()
    }

    /// Goes on from a state to the next one, unless somebody else has.
    #[inline(always)]
    fn advance(self, state: u64) -> bool {
        self.word().replace(state, FlowSlot::next(state))
    }

    #[inline(always)]
    fn word(self) -> Word {
        // SAFETY: a part of an element of the map, which stays.
        unsafe { Word::at(&raw mut (*self.0).state) }
    }

    /// What is there right now. Whoever does not own it has to ask for its state before, and
    /// after, to know whose it was and that it was whole. The two instructions of
    /// [`Word`](crate::atomic::Word) clobber memory: the compiler reads nothing across them.
    #[inline(always)]
    fn slot(&self) -> &FlowSlot {
        // SAFETY: an element of the map, which stays; it is made of integers, so that a torn
        // one is a wrong one and never an invalid one.
        unsafe { &*self.0 }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{sync::Mutex, thread, vec::Vec};

    use shunt_abi::Addr;

    use super::*;

    /// A slot that several threads may use.
    struct Shared(*mut FlowSlot);

    // SAFETY: what a slot is for.
    unsafe impl Sync for Shared {}

    impl Shared {
        fn place(&self) -> Place {
            Place(self.0)
        }
    }

    fn key(client_port: u16) -> FlowKey {
        FlowKey {
            cookie: 1,
            client: Addr::SIX4,
            server: Addr::LOOPBACK4,
            client_port,
            server_port: 15001,
            pad: 0,
        }
    }

    fn asked(port: u16) -> Endpoint {
        Endpoint::new(Addr::from_v4(port.into()), port)
    }

    fn free() -> FlowSlot {
        FlowSlot {
            state: 0,
            key: key(0),
            asked: asked(0),
            pad: 0,
        }
    }

    #[test]
    fn a_slot_has_one_connection_until_it_is_taken_out() {
        let mut slot = free();
        let place = Place(&raw mut slot);
        assert!(place.write(&key(1), &asked(1)));
        assert!(!place.write(&key(2), &asked(2)));
        assert!(!place.free_of(&key(2)));
        assert!(place.free_of(&key(1)) && !place.free_of(&key(1)));
        assert!(place.write(&key(2), &asked(2)));
        assert_eq!(place.slot().asked, asked(2));
    }

    /// Each thread publishes connections, and both that thread and the next one take them out
    /// again.
    #[test]
    fn each_connection_is_taken_out_once_and_is_whole() {
        const EACH: u16 = 20_000;
        const THREADS: u16 = 3;
        let mut slot = free();
        let shared = Shared(&raw mut slot);
        let taken = Mutex::new(Vec::new());
        let published: u32 = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (shared, taken) = (&shared, &taken);
                    scope.spawn(move || {
                        let port = |thread: u16, number| thread % THREADS + THREADS * number;
                        let mut published = 0;
                        let mut seen = Vec::new();
                        for number in 0..EACH {
                            let own = port(thread, number);
                            published += u32::from(shared.place().write(&key(own), &asked(own)));
                            for port in [port(thread + 1, number), own] {
                                let found = shared.place().take(&key(port));
                                seen.extend(found.map(|found| (port, found)));
                            }
                        }
                        taken.lock().expect("no panic").extend(seen);
                        published
                    })
                })
                .collect();
            let published = threads.into_iter().map(|thread| thread.join());
            published
                .map(|published| published.expect("no panic"))
                .sum()
        });
        let mut taken = taken.into_inner().expect("no panic");
        assert!(taken.iter().all(|(port, found)| *found == asked(*port)));
        assert_eq!(u32::try_from(taken.len()), Ok(published));
        taken.sort_by_key(|(port, _)| *port);
        taken.dedup_by_key(|(port, _)| *port);
        assert_eq!(u32::try_from(taken.len()), Ok(published));
        assert!(FlowSlot::is_free(slot.state) && published > 0);
    }
}
