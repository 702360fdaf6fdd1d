#!/usr/bin/env bash
# A run over several nodes inside a Slurm allocation: Ray's head and workers on the nodes of the job, then a command, and
# everything ends with the job. Called from the project's folder, which all nodes must see under the same path:
#
#   sbatch --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --mem=0 nbs/assets/cluster.sh ./reproduce.sh paper recipes=32B-RL_m23k
#
# The command runs on the first node, with RAY_ADDRESS and CLUSTER_RAY (HOST:PORT of the head) set; called again after a kill it goes on from its last checkpoint.
# From outside: CLUSTER_PYTHON (default .venv/bin/python; `ray` lies beside it), CLUSTER_WAIT (seconds until all nodes are there; 600),
# RAY_TMPDIR (a folder of each node for Ray's sockets, logs and spilled objects, with a short path; /tmp).
set -euo pipefail

stop() { printf 'cluster.sh: %s\n' "$*" >&2; exit 2; }
[ $# -gt 0 ] || stop "which command is to run? Such as: cluster.sh ./reproduce.sh paper recipes=32B-RL_m23k"
[ -n "${SLURM_JOB_ID:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ] || stop "there is no Slurm allocation here; start this by sbatch."
CLUSTER_PYTHON=${CLUSTER_PYTHON:-$PWD/.venv/bin/python}
RAY=${CLUSTER_PYTHON%/*}/ray
[ -x "$RAY" ] || stop "$RAY is not there; call this from the project's folder, after ./reproduce.sh setup gpu."
[ ! -f locks/setup.sh ] || { . locks/setup.sh; read_env; }  # processes of Ray have the keys of .env from here, or never

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]} count=${#nodes[@]}
own=$((SLURM_JOB_ID % 3000))  # several jobs may share a node, and each has ports of its own: of the head, its jobs, its clients, each node's agent
port=$((20000 + own)) jobs=$((23000 + own)) clients=$((26000 + own)) agent=$((29000 + own))
each=(--nodes=1 --ntasks=1 --overlap ${SLURM_CPUS_ON_NODE:+--cpus-per-task=$SLURM_CPUS_ON_NODE})
gpus=(${SLURM_GPUS_ON_NODE:+--num-gpus=$SLURM_GPUS_ON_NODE})
folder=${RAY_TMPDIR:-/tmp}/ray-$SLURM_JOB_ID  # of all nodes: /tmp/ray may belong to somebody, and the path of a socket has 107 bytes at most, which $TMPDIR may fill
export PATH=${CLUSTER_PYTHON%/*}:$PATH RAY_USAGE_STATS_ENABLED=0

# whoever reaches Ray's port can run code as us: a token of this job's own, in a file that only we may read
home=${MEDVLTHINKER_HOME:-$PWD/_runs}
home=${home/#\~/${HOME:-}}  # as it may stand in .env
mkdir -p "$home"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH
RAY_AUTH_TOKEN_PATH=$(mktemp "$home/.ray-token.XXXXXX")
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

steps=() command=
end() {
    local code=$?
    trap - EXIT TERM INT
    kill ${command:+"$command"} ${steps[@]+"${steps[@]}"} 2> /dev/null || true
    wait || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
    exit "$code"
}
trap end EXIT
trap 'exit 143' TERM INT

# the address of its name, or the first that it has, but none of IPv6 and none that means the machine itself
address=$(srun "${each[@]}" --nodelist="$head" bash -c 'hostname --ip-address; hostname --all-ip-addresses' \
    | tr ' ' '\n' | grep -E '^[0-9]+([.][0-9]+){3}$' | grep -v '^127[.]' | head -n 1) || true
address=${address:-$head}
export RAY_ADDRESS=http://$address:$jobs CLUSTER_RAY=$address:$port  # where Ray takes jobs, and where it takes workers
no_proxy=${no_proxy:-${NO_PROXY:-localhost,127.0.0.1}},$address
export no_proxy NO_PROXY=$no_proxy  # where http_proxy is set, a job would be handed to the proxy

alive() { "$RAY" list nodes --address="$RAY_ADDRESS" --filter state=ALIVE --format=json 2> /dev/null | grep -o '"node_id"' | wc -l || true; }
wait_for() {  # so many nodes; nobody is asked more than once a second
    local found step deadline=$((SECONDS + ${CLUSTER_WAIT:-600}))
    while found=$(alive) && [ "$found" -lt "$1" ]; do
        for step in "${steps[@]}"; do
            kill -0 "$step" 2> /dev/null || stop "Ray ended on one of ${nodes[*]}; the lines above say why."
        done
        [ "$SECONDS" -lt "$deadline" ] || stop "after ${CLUSTER_WAIT:-600} s Ray has $found of $count nodes; CLUSTER_WAIT waits longer."
        sleep 1
    done
}

srun "${each[@]}" --nodelist="$head" "$RAY" start --head --block --node-ip-address="$address" --port="$port" --temp-dir="$folder" \
    --dashboard-host="$address" --dashboard-port="$jobs" --ray-client-server-port="$clients" --dashboard-agent-listen-port="$agent" ${gpus[@]+"${gpus[@]}"} &
steps+=($!)
wait_for 1  # workers do not look for a head for long
for node in "${nodes[@]:1}"; do
    srun "${each[@]}" --nodelist="$node" "$RAY" start --block --address="$address:$port" --dashboard-agent-listen-port="$agent" ${gpus[@]+"${gpus[@]}"} &
    steps+=($!)
done
wait_for "$count"
printf 'cluster.sh: Ray has %s nodes at %s\n' "$count" "$RAY_ADDRESS"

"$@" &  # in the background, so that a signal is heard at once
command=$!
code=0
wait -n "$command" "${steps[@]}" || code=$?
kill -0 "$command" 2> /dev/null && stop "Ray ended on one of ${nodes[*]} before the command did."
exit "$code"
