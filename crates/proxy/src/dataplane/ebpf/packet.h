// Packets that no socket of this node was asked about: those from outside, and those of pods whose sockets the programs in
// `connect.h` did not see. Like netfilter's NAT, in four places: the destination is rewritten where a packet arrives, the
// source where it leaves, in both directions; between them lies the node's own routing and firewall.
#pragma once

#include "direct.h"

// Ports for masquerading: below those that sockets of the node take by themselves, and below node ports.
#define FIRST_PORT 1024
#define PORTS 28976
#define PORT_TRIES 32

// An error is translated like the answer that it stands for.
separate int translate_error(struct __sk_buff *skb, int leaving)
{
	struct endpoint to;
	struct error error;
	struct flow *flow;

	if (!parse_error(skb, &error, leaving ? 1 : 0))
		return TC_ACT_OK;
	flow = map_lookup(&flows, &error.key);
	if (!flow)
		return leaving && error.is_unreachable && note_refused_attempt(&error.key) ? TC_ACT_SHOT : TC_ACT_OK;
	// About an answer that another node gave, and translated already where this one arrived.
	if (flow->flags & OPENS)
		return TC_ACT_OK;
	to = flow->to;
	if (leaving) {
		if (error.is_unreachable && note_refusal(&error.key, flow))
			return TC_ACT_SHOT;
		rewrite_inner(skb, &error, &to, 0);
		// From the endpoint itself, not from a router on the way.
		if (same_address(&error.source, &error.key.source))
			rewrite_outer(skb, &error, &to.address, 1);
	} else {
		__u32 device = flow->flags & PAST ? to.device : 0;

		rewrite_inner(skb, &error, &to, 1);
		rewrite_outer(skb, &error, &to.address, 0);
		if (device)
			return go_past(device);
	}
	return TC_ACT_OK;
}

// Gives the client a port of the node that no other flow to this endpoint has; whether there was one.
separate int masquerade(const struct packet *packet, const struct endpoint *endpoint)
{
	struct flow flow = {.seen = now_ns()};
	struct flow_key key = {};
	struct node *node = this_node();

	if (!packet || !endpoint || !node)
		return 0;
	key.protocol = packet->key.protocol;
	key.source = endpoint->address;
	key.source_port = endpoint->port;
	key.destination = node->addresses[packet->is_ipv6 ? 1 : 0];
	flow.to.address = packet->key.source;
	flow.to.port = packet->key.source_port;
	for (int tries = 0; tries < PORT_TRIES; tries++) {
		__u16 port = FIRST_PORT + random32() % PORTS;

		key.destination_port = big16(port);
		if (map_update(&flows, &key, &flow, BPF_NOEXIST))
			continue;
		flow.to.address = key.destination;
		flow.to.port = key.destination_port;
		key.source = packet->key.source;
		key.source_port = packet->key.source_port;
		key.destination = endpoint->address;
		key.destination_port = endpoint->port;
		key.leaving = 1;
		return !map_update(&flows, &key, &flow, BPF_ANY);
	}
	return 0;
}

// Beside OTHERS_LEFT, MOVED, COUNTED and PAST.
#define START_MASQUERADED 1

// Writes down where this flow goes and how its answers are translated back.
separate int start_flow(const struct packet *packet, const struct endpoint *endpoint, __u32 id, __u32 how)
{
	struct flow flow = {.id = id, .seen = now_ns()};
	struct flow_key key = {};

	if (!packet || !endpoint)
		return 0;
	if (how & START_MASQUERADED && !masquerade(packet, endpoint))
		return 0;
	key.protocol = packet->key.protocol;
	key.source = endpoint->address;
	key.source_port = endpoint->port;
	key.destination = packet->key.source;
	key.destination_port = packet->key.source_port;
	key.leaving = 1;
	flow.to.address = packet->key.destination;
	flow.to.port = packet->key.destination_port;
	flow.flags = ANSWER | (how & (OTHERS_LEFT | MOVED));
	if (map_update(&flows, &key, &flow, BPF_ANY))
		return 0;
	if (how & PAST) {
		key.destination = endpoint->address;
		key.destination_port = endpoint->port;
		key.source = packet->key.source;
		key.source_port = packet->key.source_port;
		flow.flags = OPENS;
		if (map_update(&flows, &key, &flow, BPF_ANY))
			return 0;
	}
	key = packet->key;
	flow.to = *endpoint;
	flow.flags = PICKED | (how & (MOVED | COUNTED | PAST));
	flow.bytes = packet->length;
	if (how & COUNTED)
		add_load(endpoint, key.protocol, LOAD_OF_FLOWS, 1);
	return !map_update(&flows, &key, &flow, BPF_ANY);
}

// A packet that goes on in its flow.
inlined void note_packet(const struct packet *packet, struct flow *flow, __u64 now)
{
	flow->seen = now;
	flow->bytes += packet->length;
	if (packet->tcp_flags & (TCP_FIN | TCP_RST))
		flow->flags |= CLOSED;
}

// Whether a packet goes on in its flow, or is the first of a new one that looks the same.
inlined int goes_on(const struct packet *packet, struct flow *flow)
{
	__u64 now = now_ns();
	__u64 idle = now - flow->seen;

	if (flow->flags & PICKED) {
		if (packet->key.protocol == IPPROTO_UDP) {
			if (idle > UDP_IDLE || !is_member(flow->id, SERVING, &flow->to))
				return 0;
			if (flow->flags & PAST && !is_still_taken(flow))
				return 0;
		} else if (is_first_syn(packet)) {
			if (idle > SYN_REPEATS || flow->flags & TALKED || (flow->flags & PAST && !is_still_taken(flow)))
				return 0;
			if (!(flow->flags & (ANSWERED | MOVED))) {
				// The answer may be on its way, past this node.
				if (!(flow->flags & PAST) || flow->flags & REPEATED)
					return 0;
				flow->flags |= REPEATED;
			}
		} else {
			flow->flags |= TALKED;
			if (flow->flags & PAST)
				note_acknowledgement(packet, flow, flow->seen);
		}
	}
	note_packet(packet, flow, now);
	return 1;
}

inlined int may_use(const struct frontend *frontend, const union address *source)
{
	struct source_key key = {.prefix_length = 32 + 128, .id = frontend->id};

	set_address(key.address, source);
	return !(frontend->flags & FIREWALL) || map_lookup(&sources, &key);
}

// How the answers of a new flow come back: as bits for `start_flow`.
inlined __u32 way_back(const struct packet *packet, const struct frontend *frontend, const struct node *node,
		       const struct endpoint *endpoint, int in_pods, int may_go_past)
{
	if (frontend->flags & DIRECT && !in_pods) {
		if (may_go_past && goes_past(packet, node, frontend->id, endpoint))
			return PAST;
		// Those of an endpoint of this node come through it in any case.
		if (is_member(frontend->id, TAKEN_HERE, endpoint))
			return 0;
	}
	if (frontend->flags & MASQUERADE ||
	    (frontend->flags & MASQUERADE_OUTSIDE && !in_pods && node->has_pods[packet->is_ipv6 ? 1 : 0]) ||
	    same_address(&endpoint->address, &packet->key.source))
		return START_MASQUERADED;
	return 0;
}

// Its endpoint did not answer: affinity must not lead there again.
inlined void forget_client(__u32 list, const union address *client)
{
	struct affinity_key key = {.list = list};

	set_address(key.client, client);
	map_delete(&affinities, &key);
}

// What looked like this before is not translated any more: a new connection is somebody else's, with all its packets. A late
// answer of the endpoint that was tried comes from an address that the client does not know.
separate int leave_flow(const struct packet *packet, const struct endpoint *to)
{
	struct flow_key key;

	if (!packet || !to || !is_first_syn(packet))
		return 0;
	key = packet->key;
	map_delete(&flows, &key);
	key.source = to->address;
	key.source_port = to->port;
	key.destination = packet->key.source;
	key.destination_port = packet->key.source_port;
	key.leaving = 1;
	map_delete(&flows, &key);
	return 0;
}

SEC("classifier/arriving") int arriving(struct __sk_buff *skb)
{
	struct endpoint endpoint = {};
	struct frontend *frontend;
	struct packet packet;
	struct flow *flow;
	struct node *node;
	struct endpoint tried = {};
	__u32 list, count, how = 0;
	int in_pods, again = 0;

	if (!parse(skb, &packet, 0)) {
		if (packet.key.protocol == (packet.is_ipv6 ? IPPROTO_IPV6 : IPPROTO_IPIP))
			return open_capsule(skb, &packet, &endpoint);
		return translate_error(skb, 0);
	}
	flow = map_lookup(&flows, &packet.key);
	if (flow && goes_on(&packet, flow)) {
		// Of a flow that is answered past this node, the endpoint's end does not come this way.
		if (packet.tcp_flags & TCP_RST || (flow->flags & PAST && packet.tcp_flags & TCP_FIN))
			uncount_flow(flow, packet.key.protocol);
		endpoint = flow->to;
		if (flow->flags & PAST && endpoint.device && packet.key.protocol == IPPROTO_TCP && !is_first_syn(&packet))
			return rewrite(skb, &packet, &endpoint, 0) ? TC_ACT_SHOT : go_past(endpoint.device);
		return rewrite(skb, &packet, &endpoint, 0);
	}
	// The same client and endpoint as in a flow of old, but this time it is this endpoint that was given.
	if (flow && flow->flags & MOVED) {
		map_delete(&flows, &packet.key);
		return TC_ACT_OK;
	}
	if (flow && packet.key.protocol == IPPROTO_TCP && !(flow->flags & ANSWERED) && now_ns() - flow->seen < SYN_REPEATS) {
		again = 1;
		tried = flow->to;
	}
	node = this_node();
	if (!node) {
		// Another mode has taken over.
		if (flow)
			leave_flow(&packet, &flow->to);
		return TC_ACT_OK;
	}
	// No connection starts in its middle: one to a Service is another mode's, which translates it later. And it spares the
	// packets between pods the next questions.
	if (packet.key.protocol == IPPROTO_TCP && !is_first_syn(&packet))
		return TC_ACT_OK;
	frontend = find_frontend(&packet.key.destination, packet.key.destination_port, packet.key.protocol);
	if (!frontend) {
		if (flow)
			leave_flow(&packet, &flow->to);
		// An address of a Service that nobody has: forwarded, it would come back.
		if (in_networks(&packet.key.destination, node->services, node->service_networks))
			return TC_ACT_SHOT;
		if (is_first_syn(&packet) && note_straight(&packet.key.destination, packet.key.destination_port))
			return TC_ACT_SHOT;
		return TC_ACT_OK;
	}
	in_pods = in_networks(&packet.key.source, node->pods, node->pod_networks);
	if (!may_use(frontend, &packet.key.source))
		return TC_ACT_SHOT;
	list = in_pods ? frontend->list : frontend->outside_list;
	count = in_pods ? frontend->count : frontend->outside_count;
	if (!count) {
		note_rejected_packet(&packet.key);
		if (!(frontend->flags & REFUSED))
			return TC_ACT_SHOT;
		// Nobody can listen on port 0: the node itself refuses, and its answer is translated back.
		endpoint.address = node->addresses[packet.is_ipv6 ? 1 : 0];
	} else {
		struct choice choice = {
			.list = list,
			.count = count,
			.affinity_seconds = frontend->affinity_seconds,
			.flags = frontend->flags,
			.hash = hash_client(&packet.key.source, packet.key.source_port, packet.key.protocol),
			.tried = tried,
		};

		if (again)
			forget_client(list, &packet.key.source);
		if (!pick(&choice, &packet.key.source, packet.key.protocol, &endpoint))
			return TC_ACT_SHOT;
		// A first SYN and its repetition were not answered: perhaps not even taken.
		how |= way_back(&packet, frontend, node, &endpoint, in_pods, !(again && flow->flags & PAST));
		if (frontend->flags & LEAST_LOAD)
			how |= COUNTED;
		// Once: if the second refuses, too, the client is told.
		if (count > 1 && !again && !(how & PAST) && holds_refusals())
			how |= OTHERS_LEFT;
	}
	if (flow)
		uncount_flow(flow, packet.key.protocol);
	if (count)
		note_start(&packet, &endpoint, again ? &tried : NULL, how & PAST ? UNSEEN : count > 1 ? OTHERS : 0);
	// A full table: the client asks again.
	if (!start_flow(&packet, &endpoint, frontend->id, how))
		return TC_ACT_SHOT;
	return rewrite(skb, &packet, &endpoint, 0);
}

// A reset has the number that the other side expects next, and 0 where a SYN expects none.
inlined int answers_syn(struct __sk_buff *skb, const struct packet *packet)
{
	__be32 sequence;

	return !load_bytes(skb, packet->transport + TCP_SEQUENCE, &sequence, sizeof(sequence)) && !sequence;
}

SEC("classifier/leaving") int leaving(struct __sk_buff *skb)
{
	struct endpoint endpoint;
	struct packet packet;
	struct flow *flow;

	if (!parse(skb, &packet, 1))
		return translate_error(skb, 1);
	flow = map_lookup(&flows, &packet.key);
	if (flow) {
		note_packet(&packet, flow, now_ns());
		if (flow->flags & OPENS)
			return send_past(skb, &packet, flow);
		// The client repeats its SYN, which then goes to another endpoint.
		if (packet.tcp_flags & TCP_RST && note_refusal(&packet.key, flow))
			return TC_ACT_SHOT;
		if (flow->flags & ANSWER) {
			note_answer(&packet, flow);
			if (packet.tcp_flags & (TCP_FIN | TCP_RST))
				end_flow(&packet, flow);
		}
		endpoint = flow->to;
		return rewrite(skb, &packet, &endpoint, 1);
	}
	if ((packet.tcp_flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK) && is_too_late(&packet.key))
		return TC_ACT_SHOT;
	if (packet.tcp_flags & TCP_RST && answers_syn(skb, &packet) && note_refused_attempt(&packet.key))
		return TC_ACT_SHOT;
	// From a socket of this node that was left alone: to an address that only others may use, or that nobody has.
	if (!skb->ingress_ifindex) {
		struct frontend *frontend;
		struct node *node = this_node();

		if (!node)
			return TC_ACT_OK;
		frontend = find_frontend(&packet.key.destination, packet.key.destination_port, packet.key.protocol);
		if (frontend && !frontend->count)
			note_rejected_packet(&packet.key);
		if (frontend ? frontend->flags & FIREWALL || !frontend->count
			     : in_networks(&packet.key.destination, node->services, node->service_networks))
			return TC_ACT_SHOT;
	}
	return TC_ACT_OK;
}
