// How connections to endpoints go: counted per address that was asked for and endpoint that was given, so that user space
// reads a few numbers instead of hearing of every connection. It is told at most 20 times a second that there are new ones,
// and of refusals.
#pragma once

#include "pick.h"

// Between two times that new connections are told of, and between two refusals of one endpoint.
#define BELL_PAUSE (50 * SECOND / 1000)
#define REFUSAL_PAUSE (10 * SECOND / 1000)
// A SYN that was not answered for so long has been seen by user space; the next one is new.
#define STALE SECOND

struct contact_key {
	union address asked;
	union address given;
	__be16 asked_port;
	__be16 given_port;
	__u8 protocol;
	__u8 unused[3];
};

struct contact {
	// When the first of the SYNs was sent that no answer has followed; 0: there is none.
	__u64 asked_at;
	__u64 answered_at;
	__u64 refusal_told_at;
	// Connections, or UDP flows.
	__u64 begun;
	__u64 answered;
	__u64 refused;
	// Clients that were sent to another endpoint after this one.
	__u64 retried;
	// Of sockets of this node: those that are open, ended without both sides having closed, and what they carried.
	__u64 open;
	__u64 resets;
	__u64 sent;
	__u64 received;
	// All together, from first SYN to answer.
	__u64 waited_ns;
};

enum event_kind {
	BEGUN = 1,
	REFUSAL = 2,
};

struct event {
	struct contact_key key;
	__u32 kind;
	__u32 unused;
};

// What user space wants; all zero is a node that nobody watches.
struct settings {
	__u32 counts;
	// Clients hear of every refusal.
	__u32 passes_refusals;
	// Of the first SYN of a socket that is sent to an endpoint, in the kernel's ticks; 0: the kernel's own.
	__u32 first_timeout;
	__u32 unused;
};

// A socket of a pod that has sent its first SYN. A newer one may take its place at any time.
struct attempt {
	union address client;
	struct endpoint asked;
	struct endpoint given;
	__u64 at;
	__be16 port;
	__u16 outcome;
	__u32 unused;
};

enum attempt_outcome {
	OPEN = 0,
	// It has not heard of that.
	REFUSED_ONCE = 1,
	// It has been given another endpoint.
	GONE_ELSEWHERE = 2,
};

#define ATTEMPTS 4096

struct place_key {
	__be32 address[4];
	__be16 port;
	__u16 unused;
};

struct {
	INTEGER(type, BPF_MAP_TYPE_LRU_HASH);
	INTEGER(max_entries, 1 << 16);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct contact_key);
	TYPE(value, struct contact);
} contacts SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_ARRAY);
	INTEGER(max_entries, 1);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, __u32);
	TYPE(value, struct settings);
} settings SEC(".maps");

// When new connections were last told of.
struct {
	INTEGER(type, BPF_MAP_TYPE_ARRAY);
	INTEGER(max_entries, 1);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, __u32);
	TYPE(value, __u64);
} bells SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_RINGBUF);
	INTEGER(max_entries, 1 << 16);
	INTEGER(pinning, PIN_BY_NAME);
} events SEC(".maps");

enum listener_flags {
	// An endpoint that is not the only one of its Service: whose node picked it does not matter.
	HERE = 1,
	// Takes no connections: SYNs of others are dropped, so that their nodes see no answer.
	FROZEN = 2,
};

// Of this node.
struct {
	INTEGER(type, BPF_MAP_TYPE_HASH);
	INTEGER(max_entries, 1 << 14);
	INTEGER(map_flags, BPF_F_NO_PREALLOC);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct place_key);
	TYPE(value, __u32);
} listeners SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_ARRAY);
	INTEGER(max_entries, ATTEMPTS);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, __u32);
	TYPE(value, struct attempt);
} attempts SEC(".maps");

inlined struct settings *wanted(void)
{
	__u32 zero = 0;

	return map_lookup(&settings, &zero);
}

inlined int is_watched(void)
{
	struct settings *held = wanted();

	return held && held->counts;
}

inlined int holds_refusals(void)
{
	struct settings *held = wanted();

	return held && !held->passes_refusals;
}

inlined void name_contact(struct contact_key *key, const struct endpoint *asked, const struct endpoint *given, __u8 protocol)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->asked = asked->address;
	key->given = given->address;
	key->asked_port = asked->port;
	key->given_port = given->port;
	key->protocol = protocol;
}

separate int add_contact(const struct contact_key *key)
{
	struct contact none = {};

	return key ? map_update(&contacts, key, &none, BPF_NOEXIST) : 0;
}

inlined struct contact *contact_of(const struct contact_key *key)
{
	struct contact *contact = map_lookup(&contacts, key);

	if (contact)
		return contact;
	add_contact(key);
	return map_lookup(&contacts, key);
}

inlined void add(__u64 *number, __u64 more)
{
	__sync_fetch_and_add(number, more);
}

separate int tell(const struct contact_key *key, __u32 kind)
{
	struct event event = {.kind = kind};

	if (!key)
		return 0;
	event.key = *key;
	return ring_output(&events, &event, sizeof(event), 0);
}

// There is no endpoint for whoever asks for this.
inlined void note_rejected(const union address *address, __be16 port, __u8 protocol)
{
	struct frontend_key key = {.port = port, .protocol = protocol};
	__u64 first = 1, *count;

	if (!is_watched())
		return;
	set_address(key.address, address);
	count = map_lookup(&rejected, &key);
	if (count)
		add(count, 1);
	else
		map_update(&rejected, &key, &first, BPF_NOEXIST);
}

separate int note_rejected_packet(const struct flow_key *key)
{
	if (key)
		note_rejected(&key->destination, key->destination_port, key->protocol);
	return 0;
}

// There are new connections, this one among them.
inlined void ring_bell(const struct contact_key *key, __u64 now)
{
	__u32 zero = 0;
	__u64 *rung = map_lookup(&bells, &zero);

	if (rung && now - *rung > BELL_PAUSE) {
		*rung = now;
		tell(key, BEGUN);
	}
}

enum begun_how {
	// The endpoint is not the only one.
	OTHERS = 1,
	// It is a TCP socket of this node, which is open from now on.
	SOCKET = 2,
	// Its answer does not come this way: that none was seen is no evidence.
	UNSEEN = 4,
};

// A SYN, or the first packet of a UDP flow.
separate int note_begun(const struct contact_key *key, __u32 how)
{
	struct contact *contact;
	__u64 now = now_ns();

	if (!key)
		return 0;
	contact = contact_of(key);
	if (!contact)
		return 0;
	add(&contact->begun, 1);
	if (key->protocol != IPPROTO_TCP || how & UNSEEN)
		return 0;
	if (!contact->asked_at || now - contact->asked_at > STALE)
		contact->asked_at = now;
	if (how & SOCKET)
		add(&contact->open, 1);
	if (how & OTHERS)
		ring_bell(key, now);
	return 0;
}

separate int note_answered(const struct contact_key *key, __u64 begun)
{
	struct contact *contact;
	__u64 now = now_ns();

	contact = key ? map_lookup(&contacts, key) : NULL;
	if (!contact)
		return 0;
	contact->asked_at = 0;
	contact->answered_at = now;
	add(&contact->answered, 1);
	add(&contact->waited_ns, now - begun);
	return 0;
}

// A SYN was answered by a refusal. With `held` its client does not hear of it.
separate int note_refused(const struct contact_key *key, int held)
{
	struct contact *contact;
	__u64 now = now_ns();

	contact = key ? map_lookup(&contacts, key) : NULL;
	if (!contact)
		return 0;
	contact->asked_at = 0;
	add(&contact->refused, 1);
	if (held)
		add(&contact->retried, 1);
	if (now - contact->refusal_told_at > REFUSAL_PAUSE) {
		contact->refusal_told_at = now;
		tell(key, REFUSAL);
	}
	return 0;
}

inlined struct attempt *attempt_of(const union address *client, __be16 port)
{
	__u32 at = ((client->words[2] ^ client->words[3]) * 31 + port) * 2654435761U >> 20;

	return map_lookup(&attempts, &at);
}

// A SYN that goes straight to a listener; whether it is to be dropped.
separate int note_straight(const union address *address, __be16 port)
{
	struct place_key place = {.port = port};
	struct contact_key key = {.protocol = IPPROTO_TCP};
	__u32 *flags;

	if (!address)
		return 0;
	set_address(place.address, address);
	flags = map_lookup(&listeners, &place);
	if (!flags)
		return 0;
	if (*flags & FROZEN)
		return 1;
	if (*flags & HERE && is_watched()) {
		key.given = *address;
		key.given_port = port;
		ring_bell(&key, now_ns());
	}
	return 0;
}
