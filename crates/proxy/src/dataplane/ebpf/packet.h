// Packets that no socket of this node was asked about: those from outside, and those of pods whose sockets the programs in
// `connect.h` did not see. Like netfilter's NAT, in four places: the destination is rewritten where a packet arrives, the
// source where it leaves, in both directions; between them lies the node's own routing and firewall.
#pragma once

#include "pick.h"

#define TCP_FLAGS 13
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16
// Known to kernels since 6.16; older ones refuse it.
#define CHECKSUM_OF_IPV6 (1ULL << 7)
#define INVALID 22
// Ports for masquerading: below those that sockets of the node take by themselves, and below node ports.
#define FIRST_PORT 1024
#define PORTS 28976
#define PORT_TRIES 32
// A UDP client that was silent for so long is a new one; a SYN that comes later than this is no repetition.
#define UDP_IDLE (120 * SECOND)
#define SYN_REPEATS (5 * SECOND)

struct packet {
	struct flow_key key;
	__u32 transport;
	__u8 is_ipv6;
	__u8 tcp_flags;
};

// Whether this is a packet that Services are about.
inlined int parse(struct __sk_buff *skb, struct packet *packet, __u8 leaving)
{
	__be16 ports[2];

	__builtin_memset(packet, 0, sizeof(*packet));
	packet->key.leaving = leaving;
	if (skb->protocol == big16(ETH_P_IP)) {
		struct iphdr header;

		if (load_bytes(skb, ETH_HLEN, &header, sizeof(header)))
			return 0;
		// Ports are in the first fragment only: fragments are not translated at all.
		if (header.ihl < 5 || header.frag_off & big16(0x3fff))
			return 0;
		set_ipv4(&packet->key.source, header.saddr);
		set_ipv4(&packet->key.destination, header.daddr);
		packet->key.protocol = header.protocol;
		packet->transport = ETH_HLEN + header.ihl * 4;
	} else if (skb->protocol == big16(ETH_P_IPV6)) {
		struct ipv6hdr header;

		if (load_bytes(skb, ETH_HLEN, &header, sizeof(header)))
			return 0;
		__builtin_memcpy(&packet->key.source, &header.saddr, 16);
		__builtin_memcpy(&packet->key.destination, &header.daddr, 16);
		packet->key.protocol = header.nexthdr;
		packet->transport = ETH_HLEN + sizeof(header);
		packet->is_ipv6 = 1;
	} else {
		return 0;
	}
	if (packet->key.protocol != IPPROTO_TCP && packet->key.protocol != IPPROTO_UDP)
		return 0;
	if (load_bytes(skb, packet->transport, ports, sizeof(ports)))
		return 0;
	packet->key.source_port = ports[0];
	packet->key.destination_port = ports[1];
	if (packet->key.protocol == IPPROTO_TCP)
		load_bytes(skb, packet->transport + TCP_FLAGS, &packet->tcp_flags, 1);
	return 1;
}

inlined int is_first_syn(const struct packet *packet)
{
	return (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

// Writes a new destination or source, address and port.
separate int rewrite(struct __sk_buff *skb, const struct packet *packet, const struct endpoint *to, int source)
{
	union address from, address;
	__u32 transport, checksum;
	__be16 from_port, port;
	__u64 flags = 0;

	if (!packet || !to)
		return TC_ACT_SHOT;
	from = source ? packet->key.source : packet->key.destination;
	from_port = source ? packet->key.source_port : packet->key.destination_port;
	address = to->address;
	port = to->port;
	transport = packet->transport;
	checksum = transport + 16;
	if (packet->key.protocol == IPPROTO_UDP) {
		checksum = transport + 6;
		// A UDP packet without a checksum stays without.
		flags = BPF_F_MARK_MANGLED_0;
	}
	if (packet->is_ipv6) {
		long difference = checksum_difference(&from, 16, &address, 16, 0);

		if (replace_l4_checksum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR | CHECKSUM_OF_IPV6 | flags) == -INVALID)
			replace_l4_checksum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR | flags);
		store_bytes(skb, ETH_HLEN + (source ? 8 : 24), &address, 16, 0);
	} else {
		replace_l4_checksum(skb, checksum, from.words[3], address.words[3], BPF_F_PSEUDO_HDR | flags | 4);
		replace_l3_checksum(skb, ETH_HLEN + 10, from.words[3], address.words[3], 4);
		store_bytes(skb, ETH_HLEN + (source ? 12 : 16), &address.words[3], 4, 0);
	}
	replace_l4_checksum(skb, checksum, from_port, port, flags | 2);
	if (store_bytes(skb, transport + (source ? 0 : 2), &port, 2, 0))
		return TC_ACT_SHOT;
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

// Writes down where this flow goes and how its answers are translated back.
separate int start_flow(const struct packet *packet, const struct endpoint *endpoint, __u32 id, int masquerades)
{
	struct flow flow = {.id = id, .seen = now_ns()};
	struct flow_key key = {};

	if (!packet || !endpoint)
		return 0;
	if (masquerades && !masquerade(packet, endpoint))
		return 0;
	key.protocol = packet->key.protocol;
	key.source = endpoint->address;
	key.source_port = endpoint->port;
	key.destination = packet->key.source;
	key.destination_port = packet->key.source_port;
	key.leaving = 1;
	flow.to.address = packet->key.destination;
	flow.to.port = packet->key.destination_port;
	flow.flags = ANSWER;
	if (map_update(&flows, &key, &flow, BPF_ANY))
		return 0;
	key = packet->key;
	flow.to = *endpoint;
	flow.flags = PICKED;
	return !map_update(&flows, &key, &flow, BPF_ANY);
}

// Whether a packet goes on in its flow, or is the first of a new one that looks the same.
inlined int goes_on(const struct packet *packet, struct flow *flow)
{
	__u64 now = now_ns();
	__u64 idle = now - flow->seen;

	if (flow->flags & PICKED) {
		if (packet->key.protocol == IPPROTO_UDP) {
			if (idle > UDP_IDLE || !is_member(flow->id, 1, &flow->to))
				return 0;
		} else if (is_first_syn(packet) && (!(flow->flags & ANSWERED) || idle > SYN_REPEATS)) {
			return 0;
		}
	}
	flow->seen = now;
	return 1;
}

inlined int may_use(const struct frontend *frontend, const union address *source)
{
	struct source_key key = {.prefix_length = 32 + 128, .id = frontend->id};

	set_address(key.address, source);
	return !(frontend->flags & FIREWALL) || map_lookup(&sources, &key);
}

SEC("classifier/arriving") int arriving(struct __sk_buff *skb)
{
	struct endpoint endpoint = {};
	struct frontend *frontend;
	struct packet packet;
	struct flow *flow;
	struct node *node;
	__u32 list, count;
	int in_pods, masquerades;

	if (!parse(skb, &packet, 0))
		return TC_ACT_OK;
	flow = map_lookup(&flows, &packet.key);
	if (flow && goes_on(&packet, flow)) {
		endpoint = flow->to;
		return rewrite(skb, &packet, &endpoint, 0);
	}
	node = this_node();
	if (!node)
		return TC_ACT_OK;
	// No connection starts in its middle: spares the packets between pods the next questions.
	frontend = NULL;
	if (packet.key.protocol != IPPROTO_TCP || is_first_syn(&packet))
		frontend = find_frontend(&packet.key.destination, packet.key.destination_port, packet.key.protocol);
	if (!frontend) {
		// An address of a Service that nobody has: forwarded, it would come back.
		int nobodys = in_networks(&packet.key.destination, node->services, node->service_networks);

		return nobodys ? TC_ACT_SHOT : TC_ACT_OK;
	}
	in_pods = in_networks(&packet.key.source, node->pods, node->pod_networks);
	if (!may_use(frontend, &packet.key.source))
		return TC_ACT_SHOT;
	list = in_pods ? frontend->list : frontend->outside_list;
	count = in_pods ? frontend->count : frontend->outside_count;
	if (!count) {
		if (!(frontend->flags & REFUSED))
			return TC_ACT_SHOT;
		// Nobody can listen on port 0: the node itself refuses, and its answer is translated back.
		endpoint.address = node->addresses[packet.is_ipv6 ? 1 : 0];
		masquerades = 0;
	} else {
		if (!pick(list, count, frontend->affinity_seconds, &packet.key.source, &endpoint))
			return TC_ACT_SHOT;
		masquerades = frontend->flags & MASQUERADE ||
			      (frontend->flags & MASQUERADE_OUTSIDE && !in_pods && node->has_pods[packet.is_ipv6 ? 1 : 0]) ||
			      same_address(&endpoint.address, &packet.key.source);
	}
	// A full table: the client asks again.
	if (!start_flow(&packet, &endpoint, frontend->id, masquerades))
		return TC_ACT_SHOT;
	return rewrite(skb, &packet, &endpoint, 0);
}

// Tells the client's direction that its endpoint has answered.
inlined void note_answer(const struct packet *packet, struct flow *answer)
{
	struct flow_key key = {.protocol = packet->key.protocol};
	struct flow *flow;

	if (answer->flags & ANSWERED || packet->tcp_flags & TCP_RST)
		return;
	answer->flags |= ANSWERED;
	key.source = packet->key.destination;
	key.source_port = packet->key.destination_port;
	key.destination = answer->to.address;
	key.destination_port = answer->to.port;
	flow = map_lookup(&flows, &key);
	if (flow)
		flow->flags |= ANSWERED;
}

SEC("classifier/leaving") int leaving(struct __sk_buff *skb)
{
	struct endpoint endpoint;
	struct packet packet;
	struct flow *flow;

	if (!parse(skb, &packet, 1))
		return TC_ACT_OK;
	flow = map_lookup(&flows, &packet.key);
	if (flow) {
		flow->seen = now_ns();
		if (flow->flags & ANSWER)
			note_answer(&packet, flow);
		endpoint = flow->to;
		return rewrite(skb, &packet, &endpoint, 1);
	}
	// From a socket of this node that was left alone: to an address that only others may use, or that nobody has.
	if (!skb->ingress_ifindex) {
		struct frontend *frontend;
		struct node *node = this_node();

		if (!node)
			return TC_ACT_OK;
		frontend = find_frontend(&packet.key.destination, packet.key.destination_port, packet.key.protocol);
		if (frontend ? frontend->flags & FIREWALL || !frontend->count
			     : in_networks(&packet.key.destination, node->services, node->service_networks))
			return TC_ACT_SHOT;
	}
	return TC_ACT_OK;
}
