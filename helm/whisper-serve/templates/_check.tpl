{{/* What no schema can say: rules between values. All that are broken are told at once. */}}
{{- define "whisper-serve.check" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- $cuda := eq $v.device "cuda" -}}
{{- $by := $v.autoscaling.by -}}
{{- $settings := $v.settings -}}
{{- $scaling := default dict $settings.scaling -}}

{{- /* settings that follow from other values */ -}}
{{- range $key, $instead := dict "http" "api.replicas, service and apiKeys" "app_name" "nothing: the application is named whisper" "metrics" "nothing: KubeRay starts Ray, with metrics on port 8080" -}}
{{- if hasKey $settings $key -}}
{{- $wrong = append $wrong (printf "settings.%s is set by the chart: use %s" $key $instead) -}}
{{- end -}}
{{- end -}}
{{- if hasKey (default dict $settings.model) "device" -}}
{{- $wrong = append $wrong "settings.model.device is set by the chart: use device" -}}
{{- end -}}
{{- range list "enabled" "topology" "pods" "features" "encoder" "decoder" -}}
{{- if hasKey $scaling . -}}
{{- $wrong = append $wrong (printf "settings.scaling.%s is set by the chart: use autoscaling.by, topology and the limits of groups" .) -}}
{{- end -}}
{{- end -}}
{{- range $stage := list "features" "encoder" "decoder" -}}
{{- $set := default dict (index $settings $stage) -}}
{{- range list "replicas" "resources" "max_replicas_per_node" -}}
{{- if hasKey $set . -}}
{{- $wrong = append $wrong (printf "settings.%s.%s is set by the chart: use groups" $stage .) -}}
{{- end -}}
{{- end -}}
{{- if hasKey $set "num_gpus" -}}
{{- if not $cuda -}}
{{- $wrong = append $wrong (printf "settings.%s.num_gpus has no effect with device: cpu" $stage) -}}
{{- else if eq $v.topology "split" -}}
{{- $wrong = append $wrong (printf "settings.%s.num_gpus has no effect with topology: split, where each replica has a GPU of its own" $stage) -}}
{{- else if le (float64 $set.num_gpus) 0.0 -}}
{{- $wrong = append $wrong (printf "settings.%s.num_gpus must be above 0 with device: cuda" $stage) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $scaling (eq $by "none") -}}
{{- $wrong = append $wrong "settings.scaling has no effect with autoscaling.by: none" -}}
{{- end -}}

{{- /* groups */ -}}
{{- range include "whisper-serve.groups" . | fromJsonArray -}}
{{- $g := .config -}}
{{- if ne $by "none" -}}
{{- if gt (int $g.minReplicas) (int $g.maxReplicas) -}}
{{- $wrong = append $wrong (printf "groups.%s.minReplicas (%d) is above its maxReplicas (%d)" .name (int $g.minReplicas) (int $g.maxReplicas)) -}}
{{- else if or (lt (int $g.replicas) (int $g.minReplicas)) (gt (int $g.replicas) (int $g.maxReplicas)) -}}
{{- $wrong = append $wrong (printf "groups.%s.replicas (%d) is not between its minReplicas (%d) and maxReplicas (%d)" .name (int $g.replicas) (int $g.minReplicas) (int $g.maxReplicas)) -}}
{{- end -}}
{{- if and (eq (int $g.minReplicas) 0) (not $scaling.zero_after_s) -}}
{{- $wrong = append $wrong (printf "groups.%s.minReplicas is 0, which needs settings.scaling.zero_after_s: how long without work" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $cuda (eq $v.topology "colocated") -}}
{{- if ne (int $v.groups.colocated.gpusPerPod) 1 -}}
{{- $wrong = append $wrong (printf "groups.colocated.gpusPerPod is %d: pods with all stages have exactly one GPU, else Ray would put the stages of one pod on different ones" (int $v.groups.colocated.gpusPerPod)) -}}
{{- end -}}
{{- $sum := 0.0 -}}
{{- range $_, $share := include "whisper-serve.gpuShares" . | fromJson -}}{{- $sum = addf $sum $share -}}{{- end -}}
{{- if gt $sum 1.000001 -}}
{{- $wrong = append $wrong (printf "the stages' num_gpus add up to %.3g, and a pod has one GPU" $sum) -}}
{{- end -}}
{{- end -}}

{{- /* scaling */ -}}
{{- if eq $by "controller" -}}
{{- if not $v.controller.prometheusUrl -}}
{{- $wrong = append $wrong "autoscaling.by: controller needs controller.prometheusUrl, as http://prometheus-operated.monitoring.svc:9090" -}}
{{- end -}}
{{- $interval := float64 $v.monitoring.scrapeIntervalSeconds -}}
{{- $stale := float64 (default 5 $scaling.stale_after_s) -}}
{{- if and $v.monitoring.enabled (lt $stale (addf (mulf 2.0 $interval) 1.0)) -}}
{{- $wrong = append $wrong (printf "settings.scaling.stale_after_s (%g) is too short for monitoring.scrapeIntervalSeconds (%g): a scrape that is late would stop all scaling; it should be two of them and 1 s" $stale $interval) -}}
{{- end -}}
{{- end -}}
{{- with $v.controller -}}
{{- if and (eq .signals "dcgm") (not $cuda) -}}
{{- $wrong = append $wrong "controller.signals: dcgm needs GPUs (device: cuda)" -}}
{{- end -}}
{{- if and .dcgmSelector (ne .signals "dcgm") -}}
{{- $wrong = append $wrong "controller.dcgmSelector has no effect without controller.signals: dcgm" -}}
{{- end -}}
{{- end -}}

{{- /* access */ -}}
{{- if and $v.apiKeys.existingSecret $v.apiKeys.keys -}}
{{- $wrong = append $wrong "apiKeys.existingSecret and apiKeys.keys: one of them" -}}
{{- end -}}
{{- $shown := list -}}
{{- if $v.ingress.enabled -}}{{- $shown = append $shown "ingress.enabled" -}}{{- end -}}
{{- if $v.route.enabled -}}{{- $shown = append $shown "route.enabled" -}}{{- end -}}
{{- if ne $v.service.type "ClusterIP" -}}{{- $shown = append $shown (printf "service.type: %s" $v.service.type) -}}{{- end -}}
{{- range $shown -}}
{{- if and $v.networkPolicy.enabled (not $v.networkPolicy.api.from) -}}
{{- $wrong = append $wrong (printf "%s needs networkPolicy.api.from: who brings its requests, as [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ingress-nginx}}}] or [{ipBlock: {cidr: 10.0.0.0/8}}]" .) -}}
{{- end -}}
{{- if not (or (include "whisper-serve.apiKeysSecret" $) $v.apiKeys.allowAnonymous) -}}
{{- $wrong = append $wrong (printf "%s shows the API to the outside: name apiKeys.existingSecret, or say apiKeys.allowAnonymous" .) -}}
{{- end -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.host) -}}
{{- $wrong = append $wrong "ingress.enabled needs ingress.host" -}}
{{- end -}}
{{- if and $v.route.enabled (not $v.route.parentRefs) -}}
{{- $wrong = append $wrong "route.enabled needs route.parentRefs: the gateways it is attached to" -}}
{{- end -}}

{{- /* weights */ -}}
{{- $source := default "embedded:base" (dig "model" "source" "embedded:base" $settings) -}}
{{- $volume := or $v.weights.existingClaim $v.weights.image -}}
{{- if and $v.weights.existingClaim $v.weights.image -}}
{{- $wrong = append $wrong "weights.existingClaim and weights.image: one of them" -}}
{{- end -}}
{{- if and $volume (not (hasPrefix "/models/" $source)) -}}
{{- $wrong = append $wrong (printf "weights are mounted at /models, and settings.model.source (%s) is not there" $source) -}}
{{- end -}}
{{- if and (hasPrefix "/models/" $source) (not $volume) -}}
{{- $wrong = append $wrong (printf "settings.model.source is %s: name weights.existingClaim or weights.image, which are mounted there" $source) -}}
{{- end -}}
{{- $named := not (or (hasPrefix "embedded:" $source) (hasPrefix "/" $source)) -}}
{{- if and $named (not $v.weights.download) -}}
{{- $wrong = append $wrong (printf "settings.model.source %s is downloaded when a pod starts: say weights.download, or name a checkpoint's path" $source) -}}
{{- end -}}
{{- if and $v.weights.download (not $named) -}}
{{- $wrong = append $wrong (printf "weights.download has no effect: settings.model.source is %s" $source) -}}
{{- end -}}

{{- /* Redis */ -}}
{{- with $v.faultTolerance -}}
{{- if and (eq .redis "external") (not (regexMatch ":[0-9]+$" .address)) -}}
{{- $wrong = append $wrong "faultTolerance.redis: external needs faultTolerance.address, as redis.cache.svc:6379" -}}
{{- end -}}
{{- if and .address (ne .redis "external") -}}
{{- $wrong = append $wrong "faultTolerance.address has no effect without faultTolerance.redis: external" -}}
{{- end -}}
{{- if and .username (ne .redis "external") -}}
{{- $wrong = append $wrong "faultTolerance.username has no effect without faultTolerance.redis: external" -}}
{{- end -}}
{{- if and .existingSecret (eq .redis "none") -}}
{{- $wrong = append $wrong "faultTolerance.existingSecret has no effect with faultTolerance.redis: none" -}}
{{- end -}}
{{- end -}}
{{- if and $v.rayAuth.existingSecret (not $v.rayAuth.enabled) -}}
{{- $wrong = append $wrong "rayAuth.existingSecret has no effect with rayAuth.enabled: false" -}}
{{- end -}}

{{- /* what KubeRay or the chart sets itself */ -}}
{{- range $v.env -}}
{{- if has .name (list "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME" "RAY_ADDRESS" "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "RAY_enable_autoscaler_v2" "HOME" "XDG_CACHE_HOME") -}}
{{- $wrong = append $wrong (printf "env: %s is set by the chart or by KubeRay" .name) -}}
{{- end -}}
{{- end -}}

{{- if $wrong -}}
{{- fail (printf "\n\nThese values do not work:\n- %s\n" (join "\n- " $wrong)) -}}
{{- end -}}
{{- end }}
