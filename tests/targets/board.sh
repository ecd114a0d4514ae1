#!/bin/bash
# A board on this machine: sshd in a network, process and mount namespace of its own, with its own users, lock folder,
# disk and boot id, behind a link that can be cut, slowed down and made lossy. Nothing of it outlives `down`.
#
#   board.sh up DIR PYTHON_BASE SITE [RECORDING TOOLS]
#                                      bring it up; DIR must not exist. PYTHON_BASE: folder with bin/python3 and lib;
#                                      SITE: site-packages that the board's users may read; RECORDING: a folder with a
#                                      Jetson's etc/, device-tree/ and class/ files, which the board then shows as
#                                      its own; TOOLS: commands that stand for that Jetson's, found first on its PATH
#                                      With ARM_ROOT in the environment, a folder made by arm_root.sh, its users live
#                                      in that arm64 system and not in this machine's
#   board.sh down DIR                  end it and remove DIR
#   board.sh reboot DIR                end every process on it, then start it with another boot id
#   board.sh stop DIR | start DIR      the two halves of that
#   board.sh link DIR up|down          the network cable
#   board.sh loss DIR PERCENT          packets lost in either direction; 0 for none
#   board.sh rate DIR KBIT             of the link in either direction; 0 for no limit
#   board.sh newkey DIR                give it another host key
#   board.sh pids DIR                  process ids on it, as this machine counts them
#
# Needs root, util-linux, iproute2, nftables, openssh-server and openssh-client.
set -euo pipefail

verb=$1
dir=$2
users=(ada:2301 ben:2302)

# Everything that makes the board look like a Jetson. Its state is open to the board's users, as root has it there.
make_jetson() {
  local recording=$1 tools=$2 place=$dir/jetson
  install -d -m 777 "$place" "$place/firmware/devicetree" "$place/modes" "$place/class"
  cp -a /etc "$place/etc"
  cp -a "$recording/etc/." "$place/etc/"
  cp -a "$recording/device-tree" "$place/firmware/devicetree/base"
  [ ! -d "$recording/sys/class" ] || cp -a "$recording/sys/class/." "$place/class/"
  local found
  find "$recording" -path '*/devfreq/*' -prune -type d -o -path '*/hwmon/hwmon*' -prune -type d |
    while read -r found; do
      install -d "$place/class/$(basename "$(dirname "$found")")"
      cp -a "$found" "$place/class/$(basename "$(dirname "$found")")/"
    done
  cp -a "$tools" "$place/bin"
  echo "$place" >"$place/bin/place"
  cp "$recording"/*.txt "$place/"
  chmod -R a+rwX "$place/firmware" "$place/class" "$place/bin" "$place"/*.txt
}

# Several boards may be up at once: each has a number of its own.
name_all() {
  net=edge-board-$1
  host_if=edgeb$1-host
  board_if=edgeb$1-dev
  address=10.99.$1.2
  gateway=10.99.$1.1
}

take_number() {
  local number
  for number in $(seq 80 99); do
    name_all "$number"
    if ip netns add "$net" 2>/dev/null; then
      echo "$number" >"$dir/number"
      return 0
    fi
  done
  echo "no number is free" >&2
  return 1
}

write_config() {
  cat >"$dir/sshd_config" <<CONFIG
Port 2222
ListenAddress $address
HostKey $dir/hostkey
PidFile none
AuthorizedKeysFile $dir/client.pub
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
UsePAM no
AllowUsers ada ben
ClientAliveInterval 5
ClientAliveCountMax 3
CONFIG
  if [ -f "$dir/arm_root" ]; then
    printf 'Match User ada,ben\n  ChrootDirectory /srv\n  SetEnv PYTHONPATH=/opt/site\n' >>"$dir/sshd_config"
  fi
  cat >"$dir/ssh_config" <<CONFIG
Host board
  HostName $address
  Port 2222
  User ada
  IdentityFile $dir/client
  IdentitiesOnly yes
  UserKnownHostsFile $dir/known_hosts
  GlobalKnownHostsFile /dev/null
CONFIG
}

know_key() {
  ssh-keygen -q -t ed25519 -N '' -C board -f "$dir/hostkey"
}

# Runs as the first process of the board: hides what is this machine's, shows what is the board's, starts sshd.
boot() {
  mount --make-rprivate /
  mount --bind -o ro "$(cat "$dir/python_base")" "$dir/base"
  mount --bind -o ro "$(cat "$dir/python_site")" "$dir/site"
  for place in /root /home /run /tmp; do
    mount -t tmpfs -o mode=755,size=64m board "$place"
  done
  chmod 1777 /tmp
  mkdir -p /run/sshd /run/lock
  chmod 1777 /run/lock
  mount --bind "$dir/home" /home
  if [ -f "$dir/arm_root" ]; then
    local arm
    arm=$(cat "$dir/arm_root")
    mount --bind "$arm/root" /srv # sshd lets nobody into a folder that lies below one that others may write
    mount -t proc proc /srv/proc
    mount --bind "$arm/cpuinfo" /srv/proc/cpuinfo
    mount -t sysfs -o ro sysfs /srv/sys
    mount --rbind /dev /srv/dev
    mount -t tmpfs -o mode=1777 board /srv/tmp
    mount -t tmpfs -o mode=755 board /srv/run
    mkdir -m 1777 /srv/run/lock
    mount --bind "$dir/home" /srv/home
    for file in passwd group; do
      mount --bind "$dir/$file" "/srv/etc/$file"
    done
    mount --bind "$dir/boot_id" /srv/proc/sys/kernel/random/boot_id
  fi
  if [ -d "$dir/jetson" ]; then
    rm -rf "$dir/jetson/sys_class"
    cp -a "$dir/jetson/class" "$dir/jetson/sys_class" # clocks do not survive a restart
    mount --bind "$dir/jetson/etc" /etc
    mount --bind "$dir/jetson/firmware" /sys/firmware
    mount --bind "$dir/jetson/sys_class" /sys/class
    mount --bind "$dir/jetson/bin" /usr/local/bin
  fi
  local base
  base=$(cat "$dir/python_base")
  if [ ! -d "$base/bin" ]; then
    mkdir -p "$base"
    mount --bind "$dir/base" "$base"
  fi
  for file in passwd group shadow; do
    mount --bind "$dir/$file" "/etc/$file"
  done
  mount --bind "$dir/boot_id" /proc/sys/kernel/random/boot_id
  exec </dev/null
  /usr/sbin/sshd -D -f "$dir/sshd_config" -E "$dir/sshd.log" &
  echo up >"$dir/state"
  # the first process of a board adopts those whose parents are gone
  while true; do wait -n || sleep 0.2; done
}

start() {
  rm -f "$dir/state"
  cat /proc/sys/kernel/random/uuid >"$dir/boot_id"
  setsid ip netns exec "$net" unshare --pid --mount --fork --mount-proc --kill-child \
    "$0" boot "$dir" </dev/null >>"$dir/boot.log" 2>&1 &
  echo $! >"$dir/pid"
  for _ in $(seq 400); do
    if [ -f "$dir/state" ] && ssh-keyscan -T 1 -p 2222 "$address" 2>/dev/null | grep -q ed25519; then
      return 0
    fi
    sleep 0.1
  done
  cat "$dir/boot.log" >&2
  return 1
}

stop() {
  local pid
  for pid in $(ip netns pids "$net" 2>/dev/null); do
    kill -9 "$pid" 2>/dev/null || true
  done
  for _ in $(seq 100); do
    [ -z "$(ip netns pids "$net" 2>/dev/null)" ] && return 0
    sleep 0.05
  done
  return 1
}

up() {
  local base=$3 site=$4 recording=${5:-} tools=${6:-} user name id
  install -d -m 755 "$dir" "$dir/base" "$dir/site" "$dir/home"
  take_number
  echo "$base" >"$dir/python_base"
  echo "$site" >"$dir/python_site"
  mount -t tmpfs -o size=700m,mode=755 board "$dir/home"
  for name in passwd group shadow; do
    install -m 644 "/etc/$name" "$dir/$name"
  done
  chmod 600 "$dir/shadow"
  for user in "${users[@]}"; do
    name=${user%:*} id=${user#*:}
    echo "$name:x:$id:$id::/home/$name:/bin/bash" >>"$dir/passwd"
    echo "$name:x:$id:" >>"$dir/group"
    echo "$name:*:20000:0:99999:7:::" >>"$dir/shadow" # '*' and not '!': a locked account refuses keys too
    install -d -o "$id" -g "$id" -m 755 "$dir/home/$name"
  done
  # a python of the board's own: an environment with this machine's packages, read-only
  local version
  version=$("$base/bin/python3" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  install -d -m 755 "$dir/home/env/bin" "$dir/home/env/lib/$version/site-packages"
  ln -s "$base/bin/python3" "$dir/home/env/bin/python"
  printf 'home = %s/bin\ninclude-system-site-packages = false\n' "$base" >"$dir/home/env/pyvenv.cfg"
  echo "$dir/site" >"$dir/home/env/lib/$version/site-packages/board.pth"
  ssh-keygen -q -t ed25519 -N '' -C client -f "$dir/client"
  know_key
  [ -z "$recording" ] || make_jetson "$recording" "$tools"
  [ -z "${ARM_ROOT:-}" ] || echo "$ARM_ROOT" >"$dir/arm_root"
  write_config
  echo "[$address]:2222 $(cut -d' ' -f1,2 "$dir/hostkey.pub")" >"$dir/known_hosts"
  ip link add "$host_if" type veth peer name "$board_if" netns "$net"
  ip addr add "$gateway/30" dev "$host_if"
  ip link set "$host_if" up
  ip -n "$net" addr add "$address/30" dev "$board_if"
  ip -n "$net" link set "$board_if" up
  ip -n "$net" link set lo up
  start
}

down() {
  stop || true
  ip netns del "$net" 2>/dev/null || true
  ip link del "$host_if" 2>/dev/null || true
  umount -l "$dir/home" 2>/dev/null || true
  rm -rf "$dir"
}

loss() {
  ip netns exec "$net" nft delete table inet faults 2>/dev/null || true
  [ "$1" = 0 ] && return 0
  ip netns exec "$net" nft -f - <<RULES
table inet faults {
  chain in { type filter hook input priority 0; numgen random mod 100 < $1 drop; }
  chain out { type filter hook output priority 0; numgen random mod 100 < $1 drop; }
}
RULES
}

rate() {
  tc qdisc del dev "$host_if" root 2>/dev/null || true
  ip netns exec "$net" tc qdisc del dev "$board_if" root 2>/dev/null || true
  [ "$1" = 0 ] && return 0
  tc qdisc add dev "$host_if" root tbf rate "$1kbit" burst 4kb latency 2s
  ip netns exec "$net" tc qdisc add dev "$board_if" root tbf rate "$1kbit" burst 4kb latency 2s
}

if [ -f "$dir/number" ]; then
  name_all "$(cat "$dir/number")"
elif [ "$verb" = up ]; then
  [ ! -e "$dir" ] || { echo "$dir exists" >&2; exit 1; }
else
  echo "there is no board in $dir" >&2
  exit 1
fi

case $verb in
  up) up "$@" ;;
  boot) boot ;;
  down) down ;;
  stop) stop ;;
  start) start ;;
  reboot) stop && start ;;
  link) ip link set "$host_if" "$3" ;;
  loss) loss "$3" ;;
  rate) rate "$3" ;;
  newkey) rm -f "$dir"/hostkey*; know_key; stop; start ;;
  pids) ip netns pids "$net" ;;
  *) sed -n '2,16p' "$0" >&2; exit 2 ;;
esac
