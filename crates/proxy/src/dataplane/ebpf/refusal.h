// What endpoints answer, in flows and to the SYNs of sockets, and who is not to hear of it.
#pragma once

#include "translate.h"

// A UDP client that was silent for so long is a new one; a SYN that comes later than this is no repetition.
#define UDP_IDLE (120 * SECOND)
#define SYN_REPEATS (5 * SECOND)

// What was sent to `endpoint` in place of `asked`, if somebody watches; whether that is so.
inlined int contact_in(struct contact_key *key, const struct endpoint *asked, const struct endpoint *endpoint, __u8 protocol)
{
	if (!is_watched())
		return 0;
	name_contact(key, asked, endpoint, protocol);
	return 1;
}

// The endpoint that answers in a flow.
inlined struct endpoint answering(const struct flow_key *key)
{
	struct endpoint endpoint = {.address = key->source, .port = key->source_port};

	return endpoint;
}

// An answer that refuses. Whether the client is not to hear of it, and to be sent to another endpoint when it repeats its SYN.
separate int note_refusal(const struct flow_key *key, const struct flow *flow)
{
	struct contact_key contact;
	struct endpoint endpoint, asked;
	int held;

	if (!key || !flow || key->protocol != IPPROTO_TCP || (flow->flags & (ANSWER | ANSWERED | MOVED)) != ANSWER)
		return 0;
	held = flow->flags & OTHERS_LEFT && holds_refusals();
	endpoint = answering(key);
	asked = flow->to;
	if (contact_in(&contact, &asked, &endpoint, IPPROTO_TCP))
		note_refused(&contact, held);
	return held;
}

// The SYN of a pod's socket, which was sent straight to the endpoint, and which this answers.
inlined struct attempt *answered_attempt(const struct flow_key *key)
{
	struct attempt *attempt = attempt_of(&key->destination, key->destination_port);

	if (!attempt || attempt->port != key->destination_port || attempt->given.port != key->source_port ||
	    !same_address(&attempt->client, &key->destination) || !same_address(&attempt->given.address, &key->source) ||
	    now_ns() - attempt->at > SYN_REPEATS)
		return NULL;
	return attempt;
}

// As `note_refusal`, for such a SYN.
separate int note_refused_attempt(const struct flow_key *key)
{
	struct endpoint endpoint;
	struct contact_key contact;
	struct attempt *attempt;

	if (!key || key->protocol != IPPROTO_TCP || !holds_refusals())
		return 0;
	attempt = answered_attempt(key);
	// Once: if the second refuses, too, the client is told.
	if (!attempt || attempt->outcome != OPEN)
		return 0;
	attempt->outcome = REFUSED_ONCE;
	endpoint = answering(key);
	name_contact(&contact, &attempt->asked, &endpoint, IPPROTO_TCP);
	note_refused(&contact, 1);
	return 1;
}

// Its endpoint answers after all, when it has been given another already.
separate int is_too_late(const struct flow_key *key)
{
	struct attempt *attempt = key ? answered_attempt(key) : NULL;

	return attempt && attempt->outcome == GONE_ELSEWHERE;
}

// The client's direction of a flow that this answers.
inlined struct flow *answered_flow(const struct packet *packet, const struct flow *answer)
{
	struct flow_key key = {.protocol = packet->key.protocol};

	key.source = packet->key.destination;
	key.source_port = packet->key.destination_port;
	key.destination = answer->to.address;
	key.destination_port = answer->to.port;
	return map_lookup(&flows, &key);
}

// Its flow's connection is no longer part of the endpoint's load.
inlined void uncount_flow(struct flow *flow, __u8 protocol)
{
	struct endpoint endpoint = flow->to;

	if (!(flow->flags & COUNTED))
		return;
	flow->flags &= ~COUNTED;
	add_load(&endpoint, protocol, LOAD_OF_FLOWS, -1);
}

// The endpoint ends it. Its client may still send, but nobody answers.
separate int end_flow(const struct packet *packet, const struct flow *answer)
{
	struct flow *flow = packet && answer ? answered_flow(packet, answer) : NULL;

	if (flow)
		uncount_flow(flow, packet->key.protocol);
	return 0;
}

// Tells the client's direction that its endpoint has answered.
inlined void note_answer(const struct packet *packet, struct flow *answer)
{
	struct endpoint endpoint, asked;
	struct contact_key contact;
	struct flow *flow;

	if (answer->flags & ANSWERED || packet->tcp_flags & TCP_RST)
		return;
	answer->flags |= ANSWERED;
	flow = answered_flow(packet, answer);
	if (!flow)
		return;
	flow->flags |= ANSWERED;
	endpoint = answering(&packet->key);
	asked = answer->to;
	if (packet->key.protocol == IPPROTO_TCP && !(flow->flags & MOVED) && contact_in(&contact, &asked, &endpoint, IPPROTO_TCP))
		note_answered(&contact, flow->seen);
}

// `how` is of `enum begun_how`. Its client asked `tried` before, and got no answer.
separate int note_start(const struct packet *packet, const struct endpoint *endpoint, const struct endpoint *tried, __u32 how)
{
	struct contact_key key;
	struct contact *contact;
	struct endpoint asked = {};

	if (!packet || !endpoint)
		return 0;
	asked.address = packet->key.destination;
	asked.port = packet->key.destination_port;
	if (!contact_in(&key, &asked, endpoint, packet->key.protocol))
		return 0;
	// There were others when it asked first.
	note_begun(&key, tried ? how | OTHERS : how);
	if (!tried || (tried->port == endpoint->port && same_address(&tried->address, &endpoint->address)))
		return 0;
	name_contact(&key, &asked, tried, packet->key.protocol);
	contact = map_lookup(&contacts, &key);
	// A refusal that was held back is counted already.
	if (contact && contact->asked_at)
		add(&contact->retried, 1);
	return 0;
}
