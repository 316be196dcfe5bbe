//! What is only forwarded through the pod: the packets of a virtual machine that
//! hangs on one of its virtual interfaces (`-k`).
//!
//! This is the one place where packets are rewritten. Everywhere else the proxy's
//! socket is handed over, or the application's is pointed at the proxy. Here
//! neither will do: the client has no socket in this namespace, and the proxy's
//! socket cannot take a packet for a foreign address, because the kernel routes
//! before it looks for sockets, and answers from a foreign address only for
//! sockets that were opened to do so (`IP_TRANSPARENT`). So this does what
//! `REDIRECT` does: a packet for somebody else goes to the first address of the
//! interface that it came in through, to the proxy's port, and the answers seem to
//! come from whom was asked. Of two connections from one port to two hosts the
//! second goes to another port ([`other_place`]), where connection tracking would
//! change the client's.
//!
//! Nothing is kept for a connection but what its socket keeps: the accepted
//! socket has the original destination, by [`handshake`](crate::handshake). The
//! map `FORWARDED` stands in while there is no such socket: before it is accepted,
//! and when what answers is no full socket any longer (a reset, a connection in
//! TIME_WAIT). Whatever arrives for a connection that no socket knows writes the
//! entry again, so that losing one loses a packet at most.
//!
//! What cannot be redirected is dropped and counted, never forwarded. Let through
//! are the answers to those who have opened a connection to the machine, which
//! `SERVED` knows; the packets of connections that are older than the enrolment
//! are redirected, and so reset, as by the mesh's rules.

use shunt_abi::{
    Addr, Endpoint, ErrorCode, INTERFACE_EXCLUDED, INTERFACE_VIRTUAL, Interface, NetnsCookie,
    PodSettings, ROUTE_LOCAL,
};
use shunt_decide::{Inbound, inbound};

use crate::{
    counters,
    ctx::{Frame, FullSocket, Socket},
    handshake::flow,
    lists::{self, PodLists},
    maps::{FORWARDED, LOOKING, ORIGINAL_DST, SERVED},
    packet::{Content, Packet},
    pods,
};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on as it is.
    Untouched,
    /// It goes on to the proxy, or comes from whom was asked.
    Redirected,
    /// It is dropped: it has to be redirected and cannot be.
    Dropped,
}

/// Where a packet comes in or goes out.
struct Crossing<'a> {
    netns: NetnsCookie,
    settings: &'a PodSettings,
    interface: &'a Interface,
}

impl Crossing<'_> {
    /// `None` when the packet is none of our business.
    #[inline(always)]
    fn of(frame: Frame) -> Option<Self> {
        let netns = pods::here();
        let settings = pods::settings(netns)?;
        let interface = lists::marked_interface(settings, frame.ifindex())?;
        (!frame.is_tagged()).then_some(Self {
            netns,
            settings,
            interface,
        })
    }
}

/// Decides over a packet that comes in through a virtual interface.
#[inline(always)]
pub fn arrives(frame: Frame) -> Fate {
    let Some(Crossing {
        netns,
        settings,
        interface,
    }) = Crossing::of(frame)
    else {
        return Fate::Untouched;
    };
    let (to, packet) = match Packet::find(frame, interface.link_header) {
        Content::Other => return Fate::Untouched,
        Content::Unreadable(to) => (to, None),
        Content::Tcp(packet) => (packet.destination.addr, Some(packet)),
    };
    if lists::route(netns, &to).is_some_and(|route| route.flags & ROUTE_LOCAL != 0) {
        // For the pod itself: `sk_lookup` decides.
        return Fate::Untouched;
    }
    let Some(port) = proxy_port(settings, interface, to) else {
        return Fate::Untouched;
    };
    let Some(packet) = packet else {
        return dropped(netns, ErrorCode::ForwardUnreadable);
    };
    let own = own_address(interface, &to);
    if own.is_unspecified() {
        return dropped(netns, ErrorCode::ForwardNoAddress);
    }
    match redirect(frame, netns, &packet, &Endpoint::new(own, port)) {
        Ok(fate) => fate,
        Err(error) => dropped(netns, error),
    }
}

/// The port of the proxy that takes what comes in through the interface on its
/// way to `to`. The decision is counted by `sk_lookup`, which sees it next.
#[inline(always)]
fn proxy_port(settings: &PodSettings, interface: &Interface, to: Addr) -> Option<u16> {
    let facts = Inbound {
        destination: to,
        // Whatever the port, says the rule of virtual interfaces.
        port: 0,
        from_self: false,
        interface_excluded: interface.flags & INTERFACE_EXCLUDED != 0,
        interface_virtual: interface.flags & INTERFACE_VIRTUAL != 0,
    };
    if !facts.interface_virtual {
        return None;
    }
    let lists = PodLists {
        list_set: settings.list_set,
    };
    inbound(settings, &facts, &lists).verdict.port(settings)
}

/// Sends a packet to the proxy, at `first` if that is free.
#[inline(always)]
fn redirect(
    frame: Frame,
    netns: NetnsCookie,
    packet: &Packet,
    first: &Endpoint,
) -> Result<Fate, ErrorCode> {
    let (client, asked) = (&packet.source, &packet.destination);
    let served = flow(netns, asked, client);
    if packet.is_first() {
        // Who opens a connection answers none, whatever was there before.
        let _ = SERVED.remove(served);
    } else {
        // SAFETY: the element is not looked into.
        if unsafe { SERVED.get(served) }.is_some() {
            return Ok(Fate::Untouched);
        }
    }
    let call = Call {
        frame,
        netns,
        client,
        asked,
    };
    let first_is = call.look_at(first);
    let fits = |place: Place| match place {
        Place::Known | Place::Published => true,
        Place::Anothers => false,
        // A packet in the middle is rather that of a connection there is.
        Place::Connection | Place::Free => packet.is_first(),
    };
    if fits(first_is) {
        return call.send(packet, first, first_is);
    }
    let second = other_place(first, asked);
    let second_is = call.look_at(&second);
    if fits(second_is) || second_is == Place::Connection {
        return call.send(packet, &second, second_is);
    }
    if first_is == Place::Anothers {
        return Err(ErrorCode::ForwardCollision);
    }
    call.send(packet, first, first_is)
}

/// Where else a connection can go when another one from the same port, to
/// somebody else, has the proxy's own port: to one that `asked` alone decides, so
/// that every packet finds it again. `sk_lookup` gives it to the proxy as well.
#[inline(always)]
fn other_place(first: &Endpoint, asked: &Endpoint) -> Endpoint {
    /// Spreads numbers that are close to each other (Knuth, 6.4).
    const SPREAD: u32 = 0x9e37_79b1;
    /// The ports below are those of the pod's own services.
    const LOWEST: u32 = 1024;
    let mut mixed = u32::from(asked.port);
    for word in asked.addr.words {
        mixed = (mixed ^ word).wrapping_mul(SPREAD);
        mixed ^= mixed >> 15;
    }
    let port = (LOWEST + mixed % (0x1_0000 - LOWEST)) as u16;
    Endpoint::new(first.addr, if port == first.port { port ^ 1 } else { port })
}

/// A connection that a packet belongs to.
struct Call<'a> {
    frame: Frame,
    netns: NetnsCookie,
    client: &'a Endpoint,
    asked: &'a Endpoint,
}

/// What there is for a client at an address of the proxy.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The socket of this very connection, which knows the original destination.
    Known,
    /// Its entry in `FORWARDED`.
    Published,
    /// Another connection.
    Anothers,
    /// A connection that nobody knows the original destination of: the entry is
    /// lost, or its socket is no full one any more.
    Connection,
    /// Nothing.
    Free,
}

impl Call<'_> {
    #[inline(always)]
    fn look_at(&self, server: &Endpoint) -> Place {
        let place = looking(self.client, || {
            self.frame
                .receiver(self.client, server, |socket| self.place_of(socket))
                .unwrap_or(Place::Free)
        });
        if place == Place::Known || place == Place::Anothers {
            return place;
        }
        // SAFETY: nobody changes an element, see `answer`.
        match unsafe { FORWARDED.get(flow(self.netns, self.client, server)) } {
            Some(asked) if same(asked, self.asked) => Place::Published,
            Some(_) => Place::Anothers,
            None => place,
        }
    }

    #[inline(always)]
    fn place_of(&self, socket: FullSocket) -> Place {
        if socket.is_listener() {
            return Place::Free;
        }
        match original(socket.socket()) {
            Some(asked) if same(asked, self.asked) => Place::Known,
            Some(_) => Place::Anothers,
            None => Place::Connection,
        }
    }

    /// Sends a packet to the proxy at `server`, and sees to it that the answer
    /// finds the original destination: in the socket, or else in `FORWARDED`.
    #[inline(always)]
    fn send(&self, packet: &Packet, server: &Endpoint, place: Place) -> Result<Fate, ErrorCode> {
        let key = flow(self.netns, self.client, server);
        if packet.is_reset() {
            // It is not answered.
            let _ = FORWARDED.remove(key);
        } else if place != Place::Known {
            FORWARDED
                .insert(key, self.asked, 0)
                .map_err(|_full| ErrorCode::ForwardFailed)?;
        }
        packet
            .set_destination(server)
            .map_err(|_no_memory| ErrorCode::ForwardFailed)?;
        Ok(Fate::Redirected)
    }
}

/// Looks for the socket of a client. Where there is no connection that runs
/// `sk_lookup`, which would take it for an arrival, decide and count.
#[inline(always)]
fn looking<R>(client: &Endpoint, look: impl FnOnce() -> R) -> R {
    let mark = LOOKING.get_ptr_mut(0);
    if let Some(mark) = mark {
        // SAFETY: the element of this processor, which this program alone writes.
        unsafe { *mark = *client };
    }
    let found = look();
    if let Some(mark) = mark {
        // SAFETY: as above. No client has port 0.
        unsafe { (*mark).port = 0 };
    }
    found
}

/// Whether this run of `sk_lookup` is but a look from here for a client's socket.
#[inline(always)]
pub fn is_look(client: &Endpoint) -> bool {
    LOOKING
        .get_ptr(0)
        // SAFETY: the element of this processor; it is read where it was written.
        .is_some_and(|mark| unsafe { same(&*mark, client) })
}

#[inline(always)]
const fn same(one: &Endpoint, other: &Endpoint) -> bool {
    one.port == other.port && one.addr.same(&other.addr)
}

/// The original destination that an accepted socket was given.
#[inline(always)]
fn original<'a>(socket: Socket) -> Option<&'a Endpoint> {
    let kept = ORIGINAL_DST.get(socket)?;
    // Without an address it is but the mark of a listener.
    (!kept.addr.same(&Addr::default())).then_some(kept)
}

/// Gives a packet that goes out through a virtual interface the source that its
/// receiver knows.
#[inline(always)]
pub fn leaves(frame: Frame) -> Fate {
    let Some(Crossing {
        netns, interface, ..
    }) = Crossing::of(frame)
    else {
        return Fate::Untouched;
    };
    let Content::Tcp(packet) = Packet::find(frame, interface.link_header) else {
        // None of the proxy's: those are whole, and their headers known.
        return Fate::Untouched;
    };
    if !frame.has_sender() && packet.is_first() {
        return serve(netns, &packet);
    }
    if !own_address(interface, &packet.source.addr).same(&packet.source.addr) {
        return Fate::Untouched;
    }
    match frame.sender().and_then(original) {
        Some(asked) => put_back(netns, &packet, asked),
        None => answer(netns, &packet),
    }
}

/// An answer of the proxy's side that no full socket gives.
#[inline(always)]
fn answer(netns: NetnsCookie, packet: &Packet) -> Fate {
    let key = flow(netns, &packet.destination, &packet.source);
    // SAFETY: nobody changes an element: a connection's next packet brings
    // another, and what the kernel drops is what was used the longest ago.
    let Some(asked) = (unsafe { FORWARDED.get(key) }) else {
        // A connection to the interface's address itself. If the entry was lost,
        // the receiver knows no such sender, and takes nothing from it.
        return Fate::Untouched;
    };
    let fate = put_back(netns, packet, asked);
    if !packet.is_answer_to_first() {
        // The connection's next packet, if there is one, writes it again.
        let _ = FORWARDED.remove(key);
    }
    fate
}

/// Makes an answer come from whom was asked.
#[inline(always)]
fn put_back(netns: NetnsCookie, packet: &Packet, asked: &Endpoint) -> Fate {
    match packet.set_source(asked) {
        Ok(()) => Fate::Redirected,
        Err(_) => dropped(netns, ErrorCode::ForwardFailed),
    }
}

/// Somebody opens a connection to what is behind the interface.
#[inline(always)]
fn serve(netns: NetnsCookie, packet: &Packet) -> Fate {
    let key = flow(netns, &packet.source, &packet.destination);
    match SERVED.insert(key, 1, 0) {
        Ok(()) => Fate::Untouched,
        Err(_) => dropped(netns, ErrorCode::ForwardFailed),
    }
}

/// The address of the interface that stands for `asked`.
#[inline(always)]
const fn own_address(interface: &Interface, asked: &Addr) -> Addr {
    if asked.is_v4() {
        interface.v4
    } else {
        interface.v6
    }
}

#[inline(always)]
fn dropped(netns: NetnsCookie, error: ErrorCode) -> Fate {
    counters::failed(netns, error);
    Fate::Dropped
}
